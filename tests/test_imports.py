"""What `import rdrop` loads."""

import subprocess
import sys

LOADED_BY_RDROP = """
import sys, torch
before = set(sys.modules)
import rdrop
print("\\n".join(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_core_imports_only_torch_and_the_standard_library():
    output = subprocess.run([sys.executable, "-c", LOADED_BY_RDROP], capture_output=True, text=True, check=True).stdout
    foreign = set(output.split()) - set(sys.stdlib_module_names) - {"rdrop", "torch"}
    assert foreign == set()
