"""What `import rdrop` loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rdrop

LOADED_BY_RDROP = """
import sys, torch
before = set(sys.modules)
import rdrop
for name in set(rdrop.__all__) - {"linear_rdrop_loss"}:  # for whose operators torch itself imports sympy and more
    getattr(rdrop, name)
print("\\n".join(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_core_imports_only_torch_and_the_standard_library():
    output = subprocess.run([sys.executable, "-c", LOADED_BY_RDROP], capture_output=True, text=True, check=True).stdout
    foreign = set(output.split()) - set(sys.stdlib_module_names) - {"rdrop", "torch"}
    assert foreign == set()


COMMANDS_WITHOUT_TORCH = """
import sys
import rdrop
from rdrop.experiments.launch.cli import run
for command in (["--help"], ["list"], ["list", "digits-vit"]):
    assert run(command) == 0
assert "torch" not in sys.modules and "matplotlib" not in sys.modules
"""


def test_help_and_list_answer_without_torch():
    pytest.importorskip("typer")
    subprocess.run([sys.executable, "-c", COMMANDS_WITHOUT_TORCH], capture_output=True, check=True)


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
import rdrop
import rdrop.integrations.transformers
"""

OLD_TRANSFORMERS = """
import transformers
transformers.__version__ = "5.5.4"
import rdrop.integrations.transformers
"""


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (WITHOUT_TRANSFORMERS, "needs transformers, which is not installed; in a clone of the repository: pip install"),
        (OLD_TRANSFORMERS, "needs transformers 5.6 or later"),
    ],
)
def test_the_integration_says_what_to_install(program, message):
    pytest.importorskip("transformers")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert message in run.stderr.splitlines()[-1]


def test_the_package_lists_what_it_offers_and_nothing_else():
    transformers = pytest.importorskip("rdrop.integrations.transformers")
    for package in (rdrop, transformers):
        assert [name for name in package.__all__ if not hasattr(package, name)] == []
    assert dir(rdrop) == sorted(rdrop.__all__)
    assert "linear_rdrop_loss" in dir(rdrop)
    assert "Any" not in dir(rdrop)


def test_type_checkers_see_what_python_does():
    tree = ast.parse(Path(rdrop.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {(module, name) for module, names in rdrop._NAMES.items() for name in names}


MODULES_OF_THE_FORWARD = """
import sys
import rdrop.integrations.targets
assert "transformers" not in sys.modules
import rdrop.integrations.transformers.forward
assert "transformers.trainer" not in sys.modules
from rdrop.integrations.transformers import RDropTrainer
"""


def test_targets_need_no_transformers_and_the_forward_no_trainer():
    pytest.importorskip("transformers")
    subprocess.run([sys.executable, "-c", MODULES_OF_THE_FORWARD], check=True)


def test_the_import_paths_that_the_first_version_documented_still_work():
    pytest.importorskip("pydantic")
    from rdrop.experiments.recipe import Count, ModelSection, Probability, Recipe, Section, load_recipe, override
    from rdrop.experiments.recipes import RECIPES, find_recipe
    from rdrop.integrations.transformers import RDropMixin, RDropSeq2SeqTrainer, RDropTrainer

    assert override(RECIPES["digits-vit"], ["alpha=0"]).method.is_plain
    assert callable(load_recipe)
    assert callable(find_recipe)
    assert issubclass(Recipe, Section)
    assert issubclass(ModelSection, Section)
    assert Count != Probability
    assert issubclass(RDropTrainer, RDropMixin)
    assert issubclass(RDropSeq2SeqTrainer, RDropMixin)


def test_what_is_no_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'rdrop' has no attribute 'rdrop_los'"):
        _ = rdrop.rdrop_los
    assert rdrop.terms.symmetric_kl is rdrop.symmetric_kl
