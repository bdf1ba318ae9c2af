"""bf16 and int8 stay close, leave no trace in what is saved, and give an image the same tokens in any company."""

import pytest
import torch

from model import AlitTokenizer
from model.inference import PRECISIONS
from model.starter import STARTER
from tests.bench.precision_error import errors, squares


@pytest.fixture(scope="module")
def rounded() -> AlitTokenizer:
    return AlitTokenizer.load(STARTER, precision="bf16")


@pytest.mark.parametrize(("precision", "most_changed"), [("bf16", 0.05), ("int8", 0.15)])
def test_the_error_on_photographs(precision, most_changed):
    for tokens, changed, _, l1_more, _, psnr_more in errors(precision):
        assert 0 < changed < most_changed, tokens
        assert abs(l1_more) < 0.002 and abs(psnr_more) < 0.1, tokens


def test_what_is_read_off_stays_float32(rounded):
    images = squares(64, 2)
    with torch.no_grad():
        step = next(rounded.rollout(images))
    assert {step.projected.dtype, step.grid.dtype, step.images.dtype} == {torch.float32}
    assert rounded.encoder.blocks[0].expand.weight.dtype == torch.bfloat16
    assert rounded.quantizer.codebook.weight.dtype == torch.float32


def test_rounded_weights_are_not_passed_on(rounded, tmp_path):
    with pytest.raises(ValueError, match="precision = 'bf16'"):
        rounded.save(tmp_path)
    with pytest.raises(ValueError, match="precision = 'bf16'"):
        rounded.resized((128, 128))
    with pytest.raises(ValueError, match="precision = 'fp8'"):
        AlitTokenizer.load(STARTER, precision="fp8")


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 1), "meta"])
def test_int8_is_for_cpus(device):
    with pytest.raises(ValueError, match=r"'int8' on device = '(cuda|meta).*allowed are \['fp32', 'bf16'\]"):
        AlitTokenizer.load(STARTER, device, precision="int8")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_and_pixels_are_the_same_bits_in_any_company(precision):
    from model import Threshold

    tokenizer, images = AlitTokenizer.load(STARTER, precision=precision), squares(64, 12)
    together = tokenizer.encode(images, Threshold("l1", max=0.06))
    assert len(set(together.num_tokens)) > 2  # images leave the batch at several budgets
    restored = tokenizer.decode(together)
    for row in range(0, 12, 3):
        alone = tokenizer.encode(images[row : row + 1], Threshold("l1", max=0.06))
        assert (alone[0] == together[row]).all()
        assert torch.equal(tokenizer.decode(alone)[0], restored[row])
