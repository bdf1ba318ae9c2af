"""The model package needs torch, numpy and safetensors alone, and its configs not even those."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
from importlib.abc import MetaPathFinder
ALLOWED = {allowed!r} | {{"model"}} | set(sys.stdlib_module_names)
SITE = {site!r}

class Block(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        # What torch itself tries to import is torch's business.
        caller = sys._getframe(1)
        while caller and "importlib" in caller.f_code.co_filename:
            caller = caller.f_back
        if caller is not None and SITE in caller.f_code.co_filename:
            return None
        if name.split(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"blocked: {{name}}")

sys.meta_path.insert(0, Block())
"""
EVERYTHING = """
import pkgutil, importlib, model
for module in pkgutil.walk_packages(model.__path__, "model."):
    importlib.import_module(module.name)
from model import AlitTokenizer, TokenBatch, Threshold, SIZES
from dataclasses import replace
import torch
config = replace(SIZES["demo"], encoder_layers=1, decoder_layers=1, budgets=(8, 16), init="paper")
tokenizer = AlitTokenizer(config).eval()
image = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
tokens = tokenizer.encode(image, Threshold("l1", max=0.0))
assert tokenizer.decode(tokens).shape == image.shape
tokenizer.save({folder!r})
AlitTokenizer.load({folder!r})
print("fine", sorted(set(name.split(".")[0] for name in sys.modules) & {others!r}))
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocked(*allowed: str) -> str:
    return BLOCKED.format(allowed=set(allowed), site="site-packages")


def test_every_module_works_with_torch_numpy_and_safetensors(tmp_path):
    others = {"ray", "mlflow", "pyarrow", "pandas", "PIL", "skimage", "sklearn", "pydantic", "scipy"}
    code = blocked("torch", "numpy", "safetensors") + EVERYTHING.format(folder=str(tmp_path / "t"), others=others)
    assert run(code) == "fine []\n"


def test_configs_and_rules_need_no_torch():
    code = blocked("numpy") + (
        "from model import AlitConfig, SIZES, Threshold\nimport model.recipes\n"
        "assert AlitConfig.from_dict(SIZES['alit_small'].to_dict()) == SIZES['alit_small']\n"
        "print('torch' in sys.modules)"
    )
    assert run(code) == "False\n"


def test_importing_has_no_effects():
    code = """
import torch
before = torch.get_rng_state(), torch.get_num_threads()
import model.tokenizer, model.official, model.finetune
assert torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.get_num_threads()
print("fine")
"""
    assert run(code) == "fine\n"
