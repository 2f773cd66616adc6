"""`LiveBytes` against sizes worked by hand, on real tensors and on those without data."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_rlhf_ext.modeling.memory.live_bytes import LiveBytes, state_tensors


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode], ids=["real", "fake"])
def test_bytes_of_a_product_and_its_gradients(mode):
    with mode(), LiveBytes() as live:
        weight = torch.empty(100, 50, requires_grad=True)  # 20,000 bytes
        inputs = torch.empty(10, 100)  # 4,000
        assert live.current == 24_000
        output = inputs @ weight  # 10 x 50 floats: 2,000
        live.begin("backward")
        output.sum().backward()  # a sum of 4 and its gradient of 4; that of the output is expanded, without a copy
        assert live.current == 24_000 + 2_000 + 20_000
        del output
        weight.grad = None
        assert live.current == 24_000
    assert sum(live.peaks["start"].values()) == 26_000
    assert 46_000 <= sum(live.peaks["backward"].values()) <= 46_000 + 16
    assert live.peak == sum(live.peaks["backward"].values())


def test_a_view_counts_once_and_what_was_freed_not_at_all():
    with LiveBytes() as live:
        tensor = torch.empty(1000)
        view = tensor[:10].t()
        assert live.current == 4000
        del tensor
        assert live.current == 4000
        del view
        assert live.current == 0 and live.peak == 4000


def test_tracked_tensors_are_known_by_their_use():
    model = torch.nn.Linear(10, 20, bias=False)
    with LiveBytes() as live:
        live.track((tensor for _, tensor in state_tensors(model)), "base weights")
        model.weight.t() @ torch.empty(20, 3)
        assert live.by_use["base weights"] == 800
        with live.using("logits"):
            logits = torch.empty(5)
        assert live.by_use["logits"] == 20
        live.relabel(logits, "gradients")
        assert (live.by_use["logits"], live.by_use["gradients"]) == (0, 20)


def test_a_layer_in_4_bits_counts_its_whole_weight_for_a_moment():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(512, 256), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    inputs = torch.randn(4, 256, requires_grad=True)
    expected = layer(inputs)
    with LiveBytes() as live:
        live.track((tensor for _, tensor in state_tensors(layer)), "base weights")
        live.track([inputs], "activations")
        packed = live.current
        torch.testing.assert_close(layer(inputs), expected)
    assert packed < 512 * 256  # half a byte a weight, and the statistics of its blocks
    assert live.peak - packed >= 512 * 256 * 4
