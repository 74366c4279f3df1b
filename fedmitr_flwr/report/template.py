"""The report's page as jinja2 templates; text, because Flower's app bundle drops HTML files."""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ css }}</style>
</head>
<body>
<main>
"""

FOOT = """
<footer>Made by fedmitr-flwr {{ version }} from the files of the run; this page needs no network and holds no client's
images. Intervals are 95 % by the number of images measured on; they say nothing of other seeds or other clients.</footer>
</main>
</body>
</html>
"""

RUN = """
<h1>{{ run.path.name }}</h1>
<p class="verdict">{{ verdict|replace(" %", "\u00a0%") }}</p>
<ul class="facts">{% for name, value in facts %}<li>{{ name }} <b>{{ value }}</b></li>{% endfor %}</ul>
{% if warnings %}<ul class="warnings">{% for text in warnings %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}

{% if accuracy %}
<section><h2>Accuracy</h2>
<p class="note">On {{ accuracy.count }} {{ accuracy.split }} images that no client trained on, all models on the same ones.
Bars are 95 % intervals, also in figures{% if accuracy.local_range %}; for the local models, from the worst to the best{% endif %}.</p>
<div class="panel">{{ accuracy.chart }}</div>
<div class="two">
<div><h3>By class</h3><div class="panel">{{ accuracy.classes }}</div></div>
<div><h3>What it takes for what</h3><div class="panel">{{ accuracy.confusion }}
<p class="note">Rows are the true classes, columns what the global model says; each row adds to 100 %.</p></div></div>
</div></section>
{% endif %}

<section><h2>Clients</h2>
<p class="note">What each upload brought. A client's weight for a class is its share in the ensemble's vote on that class.</p>
<div class="panel"><div class="wide"><table class="clients">
<tr><th>Client</th><th>Upload</th><th class="n">Images</th><th class="n">Own accuracy</th>
<th class="n">{{ "On " + accuracy.split if accuracy else "Held out" }}</th><th>Strongest in</th></tr>
{% for client in clients.rows %}<tr><td>{{ client.name }}</td>
<td class="{{ 'good' if client.outcome == 'accepted' else 'bad' }}">{{ client.outcome }}{% if client.reason %}: {{ client.reason }}{% endif %}</td>
<td class="n">{{ client.images }}</td><td class="n">{{ client.own }}</td><td class="n">{{ client.held_out }}</td>
<td>{{ client.strongest }}</td></tr>
{% endfor %}</table></div>
{% if clients.more %}<p class="note">{{ clients.more }}</p>{% endif %}</div>
{% if clients.weights %}<h3>Weight by class</h3><div class="panel">{{ clients.weights }}
<p class="note">Percent of the ensemble's vote on each class, by {{ clients.weighting }}.</p></div>{% endif %}
{% for map in clients.maps %}<h3>{{ map.title }}</h3><div class="panel">{{ map.chart }}
<p class="note">{{ map.note }}</p></div>{% endfor %}
</section>

{% if gallery %}
<section><h2>Synthetic images</h2>
<p class="note">What the server invents instead of data: {{ gallery.count }} images inverted from the client models, without any
real one. They need not look like anything; they have to teach. {{ gallery.kept }} of the patches were inverted to the end.</p>
<div class="panel gallery">
<input type="radio" name="view" id="view-plain" checked><label for="view-plain">Images</label>
<input type="radio" name="view" id="view-stopped"><label for="view-stopped">Stopped patches</label>
{% if gallery.density %}<input type="radio" name="view" id="view-density"><label for="view-density">Density</label>{% endif %}
<div class="classes">{% for row in gallery.rows %}
<div class="class"><span>{{ row.name }}</span><div class="strip">{% for image in row.images %}<span class="pic"
><img src="{{ image.uri }}" alt="synthetic {{ row.name }}"><img class="over stopped" src="{{ image.stopped }}" alt=""
>{% if image.density %}<img class="over density" src="{{ image.density }}" alt="">{% endif %}</span>{% endfor %}</div></div>
{% endfor %}</div>
<p class="note">Stopped patches are veiled in blue. Density is the ensemble's attention on the finished image, brighter orange
for more.</p></div>
{% if gallery.evolution %}<h3>How they grew</h3><div class="panel evolution">
{% for row in gallery.evolution %}<div class="class"><span>{{ row.name }}</span><div class="steps">{% for step in row.steps %}
<figure><span class="pic"><img src="{{ step.uri }}" alt="{{ row.name }}, {{ step.caption }}">{% if step.stopped %}<img
class="over" src="{{ step.stopped }}" alt="">{% endif %}</span><figcaption>{{ step.caption }}</figcaption></figure>
{% endfor %}</div></div>{% endfor %}
<p class="note">The first image of each class at every stop, with the patches stopped so far veiled in blue.</p></div>{% endif %}
</section>
{% endif %}

{% if curves %}
<section><h2>Curves</h2><div class="two">
{% for curve in curves %}<div><h3>{{ curve.title }}</h3><div class="panel">{{ curve.chart }}
{% if curve.note %}<p class="note">{{ curve.note }}</p>{% endif %}</div></div>
{% endfor %}</div></section>
{% endif %}

<section><h2>Cost</h2><div class="two">
<div><h3>Time</h3><div class="panel">{{ cost.time }}</div></div>
{% if cost.flops %}<div><h3>Arithmetic</h3><div class="panel">{{ cost.flops }}
<p class="note">{{ cost.flops_note }}</p></div></div>{% endif %}
{% if cost.memory %}<div><h3>Memory of the server's process</h3><div class="panel">{{ cost.memory }}
<p class="note">The most so far by the end of each stage{% if cost.peak %}; {{ cost.peak }} in all{% endif %}. A stage that shows no more
than the one before needed no more.</p></div></div>{% endif %}
{% if cost.gpu %}<div><h3>Memory of the GPU</h3><div class="panel">{{ cost.gpu }}</div></div>{% endif %}
</div></section>

<section><h2>To repeat it</h2><div class="panel">
{% for table in tables %}<details><summary>{{ table.title }}</summary><div class="wide"><table>
{% for name, value, changed in table.rows %}<tr{% if changed %} class="changed"{% endif %}><td><code>{{ name }}</code></td>
<td><code>{{ value }}</code></td></tr>{% endfor %}</table></div>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}</details>
{% endfor %}</div></section>
"""

COMPARISON = """
<h1>{{ columns|length }} runs side by side</h1>
<p class="verdict">{{ verdict|replace(" %", "\u00a0%") }}</p>
{% if warnings %}<ul class="warnings">{% for text in warnings %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
<section><h2>Accuracy of the global model</h2><div class="panel">{{ chart }}</div>
<div class="panel"><div class="wide"><table class="compare">
<tr><th></th>{% for name in columns %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><th scope="row">{{ row.name }}</th>{% for value in row['values'] %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div></div></section>
{% if classes %}<section><h2>By class</h2><div class="panel">{{ classes }}</div></section>{% endif %}
{% if curves %}<section><h2>Curves</h2><div class="two">{% for curve in curves %}<div><h3>{{ curve.title }}</h3>
<div class="panel">{{ curve.chart }}</div></div>{% endfor %}</div></section>{% endif %}
<section><h2>Settings that differ</h2><div class="panel">
{% if settings %}<div class="wide"><table class="compare">
<tr><th>Key</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in settings %}<tr><td><code>{{ row.name }}</code></td>{% for value in row['values'] %}<td><code>{{ value }}</code></td>{% endfor %}</tr>
{% endfor %}</table></div>{% else %}<p>None but the name.</p>{% endif %}</div></section>
{% if strips %}<section><h2>Synthetic images</h2>
{% for strip in strips %}<h3>{{ strip.name }}</h3><div class="panel"><div class="strip">{% for uri in strip.uris %}<span class="pic"
><img src="{{ uri }}" alt="synthetic image"></span>{% endfor %}</div></div>{% endfor %}</section>{% endif %}
"""
