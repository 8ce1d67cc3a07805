"""What a maintainer ships: the source distribution builds, and the checks of the public CI are those of the project."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from pre_commit.clientlib import load_config

ROOT = Path(__file__).parents[1]
NO_KERNEL = "from rdrop import kernels; print(kernels.__file__, kernels.available()['cpu'])"


def build(kind: str, source: Path, out: Path) -> Path:
    """Without an environment of its own, which would need the network: setuptools is here."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(source)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (built,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


@pytest.mark.long
def test_a_wheel_built_from_the_source_distribution_has_the_kernel_and_all_data(tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("rdrop_torch-*/")
    assert not list(source.rglob("*.so")), "the sdist carries a kernel of the machine it was made on"

    wheel = build("wheel", source, tmp_path)
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, capture_output=True, check=True)

    data = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.suffix in {".css", ".typed"}}
    assert {path for path in data if not (target / path).is_file()} == set()

    # torch is the one of this environment; rdrop is the one just installed, in front of it.
    run = subprocess.run(
        [sys.executable, "-c", NO_KERNEL], cwd=tmp_path, env={"PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    assert run.stdout.split() == [str(target / "rdrop/kernels/__init__.py"), "None"], run.stderr


def test_the_public_ci_runs_the_projects_own_checks():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert "bash .ci/run" in commands
    assert any(command.startswith("pipx run cibuildwheel==") for command in commands)


def test_pre_commit_runs_the_tools_of_the_environment():
    (local,) = load_config(str(ROOT / ".pre-commit-config.yaml"))["repos"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in local["hooks"]:
        tool, *arguments = hook["entry"].removeprefix(".venv/bin/").split()
        command = " ".join([tool, *(argument for argument in arguments if argument != "--force-exclude")])
        assert f"$(BIN)/{command}" in makefile, f"{hook['id']} is not what make runs"
