"""Jinja2 templates and CSS of the report; strings in a Python file, because Flower's app bundle drops HTML files."""

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
<footer>Rendered by fedmitr-flwr {{ version }} from the files of the run. The page loads nothing from the network and
contains no image of a client. Intervals and significance (95 %) cover only the choice of the evaluation images. They do
not cover other seeds, partitions or clients.</footer>
</main>
</body>
</html>
"""

RUN = """
<h1>{{ run.path.name }}</h1>
<p class="verdict">{{ verdict|replace(" %", "\u00a0%") }}</p>
{% if server_part %}<p class="note">{{ server_part }}</p>{% endif %}
<ul class="facts">{% for name, value in facts %}<li>{{ name }} <b>{{ value }}</b></li>{% endfor %}</ul>
{% if warnings %}<ul class="warnings">{% for text in warnings %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}

{% if accuracy %}
<section><h2>Accuracy</h2>
<p class="note">The local models are the uploaded models of the clients. One-shot FedAvg averages their weights, and the
ensemble combines their predictions. The global model is the result of the run. All models were evaluated on the same
{{ accuracy.count }} {{ accuracy.split }} images. No client trained on these images. The mark is the accuracy and the bar
its 95 % interval.{% if accuracy.local_range %} For the local models, the mark is the mean and the bar is the range from the
least to the most accurate one.{% endif %}</p>
<div class="panel">{{ accuracy.chart }}</div>
{% if accuracy.metrics %}<div class="panel"><div class="wide"><table class="compare">
<tr><th>Other metrics</th>{% for model in accuracy.metrics.models %}<th class="n">{{ model }}</th>{% endfor %}</tr>
{% for row in accuracy.metrics.rows %}<tr><th scope="row" title="{{ row.note }}">{{ row.title }}</th>{% for value in row['values'] %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% for row in accuracy.metrics.rows %}<p class="note">{{ row.title }}: {{ row.note }}</p>
{% endfor %}</div>{% endif %}
<div class="two">
<div><h3>Accuracy by class</h3><div class="panel">{{ accuracy.classes }}
<p class="note">Percentage of the images of each class that a model classifies correctly. The number is that of the global
model.</p></div></div>
<div><h3>Confusion matrix of the global model</h3><div class="panel">{{ accuracy.confusion }}
<p class="note">Rows are true classes and columns are predicted classes, in percent of the images of the row.</p></div></div>
</div></section>
{% endif %}

<section><h2>Clients</h2>
<p class="note">These columns show what a client reports about the training on its own images: Images
{%- for title in clients.reported %}, {{ title }}{% endfor %}.
MB is the size of the upload in units of 10<sup>6</sup> bytes.
{% if accuracy %}
Accuracy on {{ accuracy.split }} is the accuracy of the local model on the server's {{ accuracy.split }} images.
{% endif %}
Highest weights are the classes for which the client has the highest weights in the ensemble. For each class, the weights
of all clients add up to 100 %.</p>
<div class="panel"><div class="wide"><table class="clients">
<tr><th>Client</th><th>Upload</th><th class="n">MB</th><th class="n">Images</th>
{% for title in clients.reported %}
<th class="n">{{ title }}</th>
{% endfor %}
<th class="n">Accuracy{{ " on " + accuracy.split if accuracy }}</th><th>Highest weights</th></tr>
{% for client in clients.rows %}<tr><td>{{ client.name }}</td>
<td class="{{ 'good' if client.outcome == 'accepted' else 'bad' }}">{{ client.outcome }}{% if client.reason %}: {{ client.reason }}{% endif %}</td>
<td class="n">{{ client.upload_mb }}</td><td class="n">{{ client.images }}</td>{% for value in client.reported %}<td class="n">{{ value }}</td>{% endfor %}<td class="n">{{ client.held_out }}</td>
<td>{{ client.strongest }}</td></tr>
{% endfor %}</table></div>
{% if clients.more %}<p class="note">{{ clients.more }}</p>{% endif %}</div>
{% if clients.weights %}<h3>Ensemble weights by class</h3><div class="panel">{{ clients.weights }}
<p class="note">Weight of each client (row) for each class (column) in the ensemble, in percent. Method:
{{ clients.weighting }} (ensemble.weighting).</p></div>{% endif %}
{% for map in clients.maps %}<h3>{{ map.title }}</h3><div class="panel">{{ map.chart }}
<p class="note">{{ map.note }}</p></div>{% endfor %}
</section>

{% if gallery %}
<section><h2>Synthetic images</h2>
<p class="note">The server made {{ gallery.count }} synthetic images from the client models, without any real image. They are
training data for the distillation and need not be recognisable.{% if gallery.kept != "100 %" %} In each image
{{ gallery.kept }} of the patches were optimised until the last iteration. The others were stopped earlier.{% endif %}</p>
<div class="panel gallery">
<input type="radio" name="view" id="view-plain" checked><label for="view-plain">Images</label>
<input type="radio" name="view" id="view-stopped"><label for="view-stopped">Stopped patches</label>
{% if gallery.density %}<input type="radio" name="view" id="view-density"><label for="view-density">Density</label>{% endif %}
<div class="classes">{% for row in gallery.rows %}
<div class="class"><span>{{ row.name }}</span><div class="strip">{% for image in row.images %}<span class="pic"
><img src="{{ image.uri }}" alt="synthetic {{ row.name }}"><img class="over stopped" src="{{ image.stopped }}" alt=""
>{% if image.density %}<img class="over density" src="{{ image.density }}" alt="">{% endif %}</span>{% endfor %}</div></div>
{% endfor %}</div>
<p class="note">Stopped patches are tinted blue.{% if gallery.density %} Density is the attention of the ensemble to each
patch of the finished image. A brighter orange means more attention.{% endif %}</p></div>
{% if gallery.evolution %}<h3>Images at each stop</h3><div class="panel evolution">
{% for row in gallery.evolution %}<div class="class"><span>{{ row.name }}</span><div class="steps">{% for step in row.steps %}
<figure><span class="pic"><img src="{{ step.uri }}" alt="{{ row.name }}, {{ step.caption }}">{% if step.stopped %}<img
class="over" src="{{ step.stopped }}" alt="">{% endif %}</span><figcaption>{{ step.caption }}</figcaption></figure>
{% endfor %}</div></div>{% endfor %}
<p class="note">The first synthetic image of some classes at each stop of inversion and at the end. Patches that had been
stopped by then are tinted blue.</p></div>{% endif %}
</section>
{% endif %}

{% if curves %}
<section><h2>Curves</h2><div class="two">
{% for curve in curves %}<div><h3>{{ curve.title }}</h3><div class="panel">{{ curve.chart }}
{% if curve.note %}<p class="note">{{ curve.note }}</p>{% endif %}</div></div>
{% endfor %}</div></section>
{% endif %}

<section><h2>Cost</h2><div class="two">
<div><h3>Time</h3><div class="panel">{{ cost.time }}
<p class="note">Wall-clock time of each stage, summed over all rounds.</p></div></div>
{% if cost.flops %}<div><h3>Floating-point operations</h3><div class="panel">{{ cost.flops }}
<p class="note">{{ cost.flops_note }}</p></div></div>{% endif %}
{% if cost.memory %}<div><h3>Memory of the server process</h3><div class="panel">{{ cost.memory }}
<p class="note">Peak memory from the start of the run to the end of each stage. A stage that needs no more than the stages
before it shows their peak.{% if cost.peak %} The peak of the whole run is {{ cost.peak }}.{% endif %}</p></div></div>{% endif %}
{% if cost.gpu %}<div><h3>GPU memory</h3><div class="panel">{{ cost.gpu }}
<p class="note">Peak memory that PyTorch allocated on the GPU in each stage.</p></div></div>{% endif %}
</div></section>

<section><h2>Settings, versions and hardware</h2><div class="panel">
{% for table in tables %}<details><summary>{{ table.title }}</summary><div class="wide"><table>
{% for name, value, changed in table.rows %}<tr{% if changed %} class="changed"{% endif %}><td><code>{{ name }}</code></td>
<td><code>{{ value }}</code></td></tr>{% endfor %}</table></div>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}</details>
{% endfor %}</div></section>
"""

COMPARISON = """
<h1>Comparison of {{ columns|length }} runs</h1>
<p class="verdict">{{ verdict|replace(" %", "\u00a0%") }}</p>
{% if warnings %}<ul class="warnings">{% for text in warnings %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
<section><h2>Accuracy of the global model</h2><div class="panel">{{ chart }}</div>
<div class="panel"><div class="wide"><table class="compare">
<tr><th></th>{% for name in columns %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><th scope="row">{{ row.name }}</th>{% for value in row['values'] %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div></div></section>
{% if classes %}<section><h2>Accuracy of the global model by class</h2>
<p class="note">Percentage of the images of each class that the global model classifies correctly.</p>
<div class="panel">{{ classes }}</div></section>{% endif %}
{% if curves %}<section><h2>Curves</h2><div class="two">{% for curve in curves %}<div><h3>{{ curve.title }}</h3>
<div class="panel">{{ curve.chart }}</div></div>{% endfor %}</div></section>{% endif %}
<section><h2>Settings that differ</h2><div class="panel">
{% if settings %}<div class="wide"><table class="compare">
<tr><th>Key</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in settings %}<tr><td><code>{{ row.name }}</code></td>{% for value in row['values'] %}<td><code>{{ value }}</code></td>{% endfor %}</tr>
{% endfor %}</table></div>{% else %}<p>All settings are equal, except perhaps run.name, run.output and run.tensorboard.</p>{% endif %}</div></section>
{% if strips %}<section><h2>Synthetic images</h2>
{% for strip in strips %}<h3>{{ strip.name }}</h3><div class="panel"><div class="strip">{% for uri in strip.uris %}<span class="pic"
><img src="{{ uri }}" alt="synthetic image"></span>{% endfor %}</div></div>{% endfor %}</section>{% endif %}
"""

CSS = """
:root{color-scheme:light dark;--bg:#fbfbfa;--panel:#fff;--ink:#1c1f23;--soft:#5b6470;--line:#e2e4e8;--track:#eef0f3;
--accent:#2f62c4;--s1:#8a93a0;--s2:#d9822b;--s3:#2f62c4;--s4:#2b9a66;--warn:#9a5b00;--warnbg:#fff5e0;
--heat:#3969c9;--heatink:#fff}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--panel:#1c1f25;--ink:#e8eaee;--soft:#9aa3b0;--line:#30353d;
--track:#272b32;--accent:#7aa5f5;--s1:#8a93a0;--s2:#f0a152;--s3:#7aa5f5;--s4:#5cc796;--warn:#f4c069;--warnbg:#332a17;
--heat:#6c9bf0;--heatink:#10131a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.05rem;color:var(--soft);font-weight:600;margin:0 0 8px;overflow-wrap:anywhere}
.verdict{font-size:clamp(1.25rem,3.6vw,1.75rem);line-height:1.3;font-weight:600;margin:0 0 16px;text-wrap:pretty}
h2{font-size:1.2rem;margin:40px 0 4px}
h3{font-size:1rem;margin:20px 0 6px}
p{margin:4px 0 12px;max-width:72ch}
.note,figcaption{color:var(--soft);font-size:.9rem}
.facts{display:flex;flex-wrap:wrap;gap:8px;margin:0 0 8px;padding:0;list-style:none}
.facts li{border:1px solid var(--line);border-radius:999px;padding:2px 12px;font-size:.85rem;color:var(--soft)}
.facts b{color:var(--ink);font-weight:600}
.panel{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:16px;margin:10px 0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 16px;align-items:start}
.two>*{min-width:0}
.warnings{background:var(--warnbg);border-radius:12px;padding:12px 16px 12px 36px;margin:12px 0}
.warnings li{margin:4px 0}
.rows{display:grid;grid-template-columns:fit-content(38%) minmax(0,1fr) max-content;gap:6px 12px;align-items:center;
font-size:.9rem}
.row{display:contents}
.row .name{overflow:hidden;text-overflow:ellipsis;overflow-wrap:anywhere}
.row .value{font-variant-numeric:tabular-nums;text-align:right}
.row.strong{font-weight:650}
.track{position:relative;height:18px;background:linear-gradient(var(--track),var(--track)) center/100% 4px no-repeat;
border-radius:3px}
.track.plain{background:none}
.track .range{position:absolute;top:5px;height:8px;border-radius:4px;background:var(--s1);opacity:.55}
.track .dot{position:absolute;top:3px;width:12px;height:12px;margin-left:-6px;border-radius:50%;background:var(--s1);
border:2px solid var(--panel)}
.track .tick{position:absolute;top:0;width:3px;height:18px;margin-left:-1.5px;border-radius:2px;background:var(--ink)}
.row.strong .range{background:var(--accent)}
.row small{color:var(--soft);font-weight:400;font-size:.85em;margin-left:4px}
.track .bar{position:absolute;left:0;top:2px;height:14px;border-radius:0 4px 4px 0;min-width:1px}
.scale .track{background:none;height:1.2em}
.scale b{position:absolute;white-space:nowrap;transform:translateX(-50%);font-weight:400;font-size:.75rem;
color:var(--soft)}
.scroll{max-height:480px;overflow:auto}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.85rem;color:var(--soft);margin:0 0 8px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.plot{position:relative;margin-left:52px;height:180px}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot path{fill:none;stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.plot line{stroke:var(--line);vector-effect:non-scaling-stroke}
.yaxis b{position:absolute;left:-52px;width:46px;text-align:right;transform:translateY(-50%);font-weight:400;
font-size:.75rem;color:var(--soft)}
.xaxis{display:flex;justify-content:space-between;margin-left:52px;font-size:.75rem;color:var(--soft);padding-top:6px}
.wide{overflow-x:auto;max-width:100%;background:linear-gradient(90deg,var(--panel) 40%,transparent) 0 0/40px 100%,
linear-gradient(270deg,var(--panel) 40%,transparent) 100% 0/40px 100%,
linear-gradient(90deg,var(--line),transparent) 0 0/14px 100%,
linear-gradient(270deg,var(--line),transparent) 100% 0/14px 100%;background-repeat:no-repeat;
background-attachment:local,local,scroll,scroll}
table{border-collapse:collapse;font-size:.88rem;width:100%}
th{text-align:left;font-weight:600}
th,td{padding:4px 8px;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td{overflow-wrap:anywhere}
.wide td,.wide th{overflow-wrap:normal}
.wide td:first-child{white-space:nowrap}
.clients td:last-child{min-width:220px}
.heat{width:auto;border-collapse:separate;border-spacing:2px;font-size:.8rem}
.heat th{border:0;padding:2px 6px 2px 0;font-weight:400;color:var(--soft);white-space:nowrap;max-width:160px;
overflow:hidden;text-overflow:ellipsis}
.heat th[scope=col]{text-align:center;padding:2px;vertical-align:bottom}
.heat th[scope=col] span{display:inline-block;max-width:72px;overflow:hidden;text-overflow:ellipsis}
.heat td{border:0;min-width:30px;height:26px;padding:2px 4px;text-align:center;border-radius:4px;vertical-align:middle;
font-variant-numeric:tabular-nums;background:color-mix(in srgb,var(--heat) var(--v),var(--track))}
.heat td.full{color:var(--heatink)}
.good{color:var(--s4)}.bad{color:var(--warn)}
.gallery input{position:absolute;opacity:0;pointer-events:none}
.gallery>label{display:inline-block;border:1px solid var(--line);border-radius:999px;padding:3px 14px;
margin:0 6px 10px 0;font-size:.88rem;cursor:pointer}
.gallery input:checked+label{background:var(--accent);border-color:var(--accent);color:var(--panel)}
.gallery input:focus-visible+label{outline:2px solid var(--ink);outline-offset:2px}
.class{display:flex;gap:8px;align-items:center;margin:6px 0}
.class>div{min-width:0}
.class>span{flex:none;min-width:1.6em;max-width:110px;font-size:.88rem;overflow-wrap:anywhere}
.strip{display:flex;flex-wrap:wrap;gap:5px}
.pic{position:relative;width:46px;aspect-ratio:1;display:block}
.pic img{position:absolute;inset:0;width:100%;height:100%;image-rendering:pixelated;border-radius:4px}
.pic .over{display:none}
#view-stopped:checked~.classes .stopped,#view-density:checked~.classes .density{display:block}
.steps{display:flex;gap:10px;overflow-x:auto;padding-bottom:6px}
.steps figure{margin:0;flex:none;width:72px}
.steps .pic{width:100%}
.classes,.evolution{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:0 24px}
.evolution>p{grid-column:1/-1}
.evolution .over{display:block}
.matrix{width:min(100%,480px);image-rendering:pixelated;border:1px solid var(--line);background:var(--track)}
details{border-top:1px solid var(--line);padding:8px 0}
summary{cursor:pointer;font-weight:600}
code{font:0.88em ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
.changed td:first-child::after{content:" ●";color:var(--accent)}
footer{margin-top:40px;color:var(--soft);font-size:.85rem}
.compare th,.compare td{min-width:110px}
@media (max-width:520px){.panel{padding:12px}
.rows.stacked{display:block}
.stacked .row{display:grid;grid-template-columns:1fr max-content;gap:0 12px;margin:0 0 8px}
.stacked .row .track{grid-column:1/-1;grid-row:2}
.stacked .scale>span:not(.track){display:none}
.stacked .scale .track{margin:0 18px 0 6px}
.heat{border-spacing:1px;font-size:.72rem}
.heat td{min-width:23px;height:24px;padding:1px}
.heat th{max-width:92px}
}
@media print{body{background:#fff}.panel{break-inside:avoid}}
""".strip()
