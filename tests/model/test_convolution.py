"""The base's convolutions, 3x3 ones by tiles too, are those as written, for whatever weights and sizes they get."""

import time

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from torch import Tensor, nn

from model.base.convolution import LEAST_CHANNELS, Conv1x1, Conv3x3, UpsampleConv
from model.base.norm import GroupNorm
from model.base.winograd import PLAIN
from model.singly import image_by_image


def layer_by_tiles(channels_out: int = LEAST_CHANNELS, *, upsamples: bool = False, bias: bool = True) -> Conv3x3:
    torch.manual_seed(0)
    layer = UpsampleConv(LEAST_CHANNELS) if upsamples else Conv3x3(LEAST_CHANNELS, channels_out, bias=bias)
    layer.eval().convolve_by_tiles(True)
    return layer


def some_norm() -> GroupNorm:
    norm = GroupNorm(32, LEAST_CHANNELS, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.eval()


def exact(layer: Conv3x3, x: Tensor) -> Tensor:
    """In float64, as convolutions are defined."""
    if isinstance(layer, UpsampleConv):
        x = F.interpolate(x, scale_factor=2)
    bias = None if layer.bias is None else layer.bias.double()
    return F.conv2d(x.double(), layer.weight.double(), bias, padding=1)


def features(photographs, size: tuple[int, int], number: int = 1) -> Tensor:
    """Photographs seen through random 1x1 convolutions: [number, LEAST_CHANNELS, height, width], of unit size."""
    mixed = torch.einsum("bchw,kc->bkhw", photographs(number, size), torch.randn(LEAST_CHANNELS, 3, generator=seeded()))
    return (mixed - mixed.mean()) / mixed.std()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(32, 32), (64, 20), (36, 132)])
@pytest.mark.parametrize("kind", [{"upsamples": True}, {}, {"bias": False}, {"channels_out": 160}])
@torch.no_grad()
def test_by_tiles_is_the_convolution(photographs, kind, size, layout):
    layer, x = layer_by_tiles(**kind), features(photographs, size).contiguous(memory_format=layout)
    found, expected = layer(x), exact(layer, x)
    assert layer.kernels_PCO is not None
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).norm() / expected.norm() < 2e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(32, 32), (36, 132), (256, 64)])
@torch.no_grad()
def test_after_a_norm_is_norm_swish_and_convolution(photographs, size, layout):
    layer, norm, x = layer_by_tiles(), some_norm(), features(photographs, size, 2).contiguous(memory_format=layout)
    normed = F.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    found, expected = layer.after(norm, x), exact(layer, F.silu(normed))
    assert layer.kernels_PCO is not None
    assert (found - expected).norm() / expected.norm() < 2e-6
    layer.convolve_by_tiles(False)
    assert torch.equal(layer.after(norm, x), layer.as_written(F.silu(norm(x))))


@torch.no_grad()
def test_an_image_is_the_same_bits_in_any_company(photographs):
    layer, norm, x = layer_by_tiles(), some_norm(), features(photographs, (64, 64), 3)
    together, after = layer(x), layer.after(norm, x)
    for row in range(3):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
        assert torch.equal(layer.after(norm, x[row : row + 1])[0], after[row])


@torch.no_grad()
def test_threads_with_an_image_each_make_kernels_once_and_get_the_same_bits(photographs, monkeypatch):
    layer, norm, x = layer_by_tiles(), some_norm(), features(photographs, (64, 64), 4)
    expected, made, kernels = layer_by_tiles().after(norm, x), [], PLAIN.kernels

    def slowly(weight):
        made.append(weight)
        time.sleep(0.2)  # the other thread is here by then
        return kernels(weight)

    monkeypatch.setattr(PLAIN, "kernels", slowly)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = torch.cat(image_by_image(lambda image: layer.after(norm, image), 2, x))
    finally:
        torch.set_num_threads(before)
    assert len(made) == 1 and torch.equal(found, expected)


@pytest.mark.parametrize("size", [(32, 30), (30, 32), (28, 32), (8, 8)])
@torch.no_grad()
def test_what_is_not_tiles_or_too_few_goes_as_written(photographs, size):
    layer, x = layer_by_tiles(), features(photographs, size)
    assert torch.equal(layer(x), layer.as_written(x)) and layer.kernels_PCO is None
    narrow = Conv3x3(LEAST_CHANNELS, LEAST_CHANNELS // 2).eval()
    narrow.convolve_by_tiles(True)
    assert torch.equal(narrow(x), narrow.as_written(x))


def test_gradients_are_those_of_the_convolution(photographs):
    layer, x = layer_by_tiles(), features(photographs, (32, 32))
    assert torch.equal(layer(x), layer.as_written(x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.kernels_PCO is None


@pytest.mark.parametrize("changed", ["trained", "loaded"])
def test_changed_weights_are_the_ones_used(photographs, changed):
    layer, x = nn.Sequential(layer_by_tiles()), features(photographs, (32, 32))
    with torch.no_grad():
        before = layer(x)
        if changed == "trained":
            layer.train()
            layer[0].weight.mul_(2)
            layer.eval()
        else:
            layer.load_state_dict({"0.weight": layer[0].weight * 2, "0.bias": layer[0].bias})
        after = layer(x)
    torch.testing.assert_close(after, exact(layer[0], x).float(), rtol=0, atol=1e-4)
    assert not torch.allclose(after, before, atol=0.1)


def test_kernels_are_no_part_of_what_is_saved(photographs):
    layer, x = layer_by_tiles(), features(photographs, (32, 32))
    with torch.no_grad():
        layer(x)
    assert set(layer.state_dict()) == {"weight", "bias"} and layer.kernels_PCO is not None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_is_one_without_gradients_too(photographs, layout):
    layer, x = Conv1x1(3, 7), photographs(3, (16, 16)).contiguous(memory_format=layout)
    expected = nn.functional.conv2d(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-6)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
