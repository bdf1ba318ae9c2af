"""Images of a batch one at a time: the same bits however many go at once, and threads as they were afterwards."""

import threading

import pytest
import torch
from conftest import SMALL_CONFIGS

from model.inference import PRECISIONS, prepare_for_inference
from model.singly import image_by_image


@pytest.fixture(params=[2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seen(images, most=3):
    """What each image's work sees: the name of its thread, how many torch has there, and whether gradients flow."""
    return image_by_image(
        lambda image: (threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled(), image.item()),
        most,
        images,
    )


@torch.no_grad()
def test_whole_rounds_of_images_have_a_thread_each_and_those_left_over_all_of_them(threads):
    found = seen(torch.arange(7.0))
    assert [value for *_, value in found] == list(range(7))
    for row, (name, number, gradients, _) in enumerate(found):
        at_once = row < 7 // threads * threads
        assert name.startswith("image") == at_once
        assert number == (1 if at_once else threads) and not gradients
    assert torch.get_num_threads() == threads


def test_few_images_or_few_allowed_and_gradients_go_one_after_the_other(threads):
    main, few, many = threading.current_thread().name, torch.zeros(threads - 1), torch.zeros(threads)
    assert seen(many) == [(main, threads, True, 0.0)] * threads
    with torch.no_grad():
        assert seen(few) == [(main, threads, False, 0.0)] * (threads - 1)
        assert seen(many, threads - 1) == [(main, threads, False, 0.0)] * threads


@torch.no_grad()
def test_what_fails_is_raised_and_threads_are_as_before(threads):
    def fails(image):
        raise ArithmeticError(f"image {image.item():.0f}")

    with pytest.raises(ArithmeticError, match="image 0"):
        image_by_image(fails, 3, torch.arange(6.0))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SMALL_CONFIGS)
@torch.inference_mode()
def test_an_image_is_the_same_bits_in_any_company_and_but_for_bf16_on_any_threads(
    small, photographs, threads, name, precision
):
    tokenizer, images = small(name), photographs(threads + 1, (32, 32))
    prepare_for_inference(tokenizer, precision)

    def everything(some):
        return [tensor for step in tokenizer.rollout(some) for tensor in (step.target, step.latents, step.images)]

    together = everything(images)
    for row, image in enumerate(images.split(1)):
        assert all(
            torch.equal(whole[row : row + 1], one) for whole, one in zip(together, everything(image), strict=True)
        )
    torch.set_num_threads(1)
    if precision != "bf16":
        assert all(torch.equal(*pair) for pair in zip(together, everything(images), strict=True))
