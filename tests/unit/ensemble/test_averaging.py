import torch

from fedmitr_flwr.ensemble.averaging import fedavg, merged


def state(value: float, head: tuple[float, float]) -> dict[str, torch.Tensor]:
    rows = torch.tensor(head)
    return {"body": torch.full((3,), value), "head.weight": rows[:, None].repeat(1, 2), "head.bias": rows.clone()}


def test_fedavg_weights_by_number_of_examples():
    got = fedavg([state(0.0, (0.0, 0.0)), state(4.0, (2.0, 6.0))], torch.tensor([30, 10]))
    assert got["body"].tolist() == [1.0] * 3
    assert got["head.bias"].tolist() == [0.5, 1.5]


def test_fedavg_of_equal_models_is_that_model():
    one = state(0.1, (0.3, -0.7))
    got = fedavg([one, one, one], torch.tensor([1, 2, 4]))
    assert all(torch.equal(got[name], one[name]) for name in one)


def test_merged_scales_the_mean_update_and_puts_the_head_together_by_class():
    initial = state(1.0, (1.0, 1.0))
    weights = torch.tensor([[1.0, 0.25], [0.0, 0.75]])
    got = merged(initial, [state(3.0, (5.0, 5.0)), state(5.0, (9.0, 9.0))], weights, 1.5)
    assert got["body"].tolist() == [1.0 + 1.5 * 3.0] * 3
    assert got["head.bias"].tolist() == [5.0, 1.0 + 0.25 * 4 + 0.75 * 8]
    assert got["head.weight"].tolist() == [[5.0, 5.0], [8.0, 8.0]]


def test_merged_with_scale_zero_keeps_the_body():
    initial = state(1.0, (1.0, 1.0))
    got = merged(initial, [state(3.0, (5.0, 5.0))], torch.ones(1, 2), 0.0)
    assert torch.equal(got["body"], initial["body"])
