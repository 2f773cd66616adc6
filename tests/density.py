"""Size and readability of the library, ring by ring: what a review looks at beside the code. No limits.

python tests/density.py [CHECKOUT]      # `make density`; another checkout is measured with this one's rings

Code lines are lines with code: no docstrings, comments or blank lines. Nodes are statements and expressions of the
syntax tree. The longest function counts its docstring. Complexity is ruff's C901, which `make lint` holds at 12.
"""

import ast
import json
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from test_layers import CORE, KIT, OUTERMOST, PACKAGE

MAX_COMPLEXITY = 12
RINGS = {"core": CORE, "kit": KIT, "outermost": OUTERMOST}
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Density:
    """Counts of one file, or of several added up."""

    files: int = 0
    code_lines: int = 0
    nodes: int = 0
    comprehensions: int = 0
    conditionals: int = 0
    comments: int = 0
    complex_functions: int = 0
    longest_lines: int = 0
    longest_name: str = ""

    def add(self, other: "Density") -> None:
        self.files += other.files
        self.code_lines += other.code_lines
        self.nodes += other.nodes
        self.comprehensions += other.comprehensions
        self.conditionals += other.conditionals
        self.comments += other.comments
        self.complex_functions += other.complex_functions
        if other.longest_lines > self.longest_lines:
            self.longest_lines = other.longest_lines
            self.longest_name = other.longest_name

    def row(self, name: str) -> str:
        """One line of the table."""
        lines = max(self.code_lines, 1)  # a ring may have no file yet
        cells = [
            f"{name:20}",
            f"{self.files:6}",
            f"{self.code_lines:7}",
            f"{self.nodes / lines:11.2f}",
            f"{100 * self.comprehensions / lines:9.1f}",
            f"{100 * self.conditionals / lines:10.1f}",
            f"{100 * self.comments / lines:9.1f}",
            f"{self.complex_functions:6}",
            f"{self.longest_lines:8}",
            f" {self.longest_name}",
        ]
        return "".join(cells)


HEADER = (
    f"{'':20}{'files':>6}{'lines':>7}{'nodes/line':>11}{'compr.':>9}{'cond.exp.':>10}{'comments':>9}"
    f"{'C901':>6}{'longest':>8}  function (comprehensions, conditional expressions and comments per 100 lines)"
)


def measure(path: Path) -> Density:
    """Counts of one file, without its complexity."""
    density = Density(files=1)
    code_lines = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                density.comments += 1
            elif token.type not in NO_CODE:
                code_lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if is_docstring(node):
            code_lines -= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, (ast.stmt, ast.expr)):
            density.nodes += 1
        if isinstance(node, COMPREHENSIONS):
            density.comprehensions += 1
        if isinstance(node, ast.IfExp):
            density.conditionals += 1
        if isinstance(node, FUNCTIONS):
            length = node.end_lineno - node.lineno + 1
            if length > density.longest_lines:
                density.longest_lines = length
                density.longest_name = f"{path.stem}.{node.name}"
    density.code_lines = len(code_lines)
    return density


def is_docstring(node: ast.AST) -> bool:
    """True for a statement that is text and nothing else."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def complex_functions(folder: Path) -> Iterator[Path]:
    """The file of each function whose complexity is above the limit, once a function."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--exit-zero"]
    command += ["--select", "C901", "--config", f"lint.mccabe.max-complexity={MAX_COMPLEXITY}"]
    command += ["--output-format", "json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for finding in json.loads(done.stdout):
        yield Path(finding["filename"])


def main(checkout: Path) -> None:
    package = (checkout / PACKAGE).resolve()
    files = {path: measure(path) for path in sorted(package.rglob("*.py"))}
    for path in complex_functions(package):
        files[path].complex_functions += 1

    parts: dict[str, Density] = {}
    for path, density in files.items():
        part = path.relative_to(package).parts[0].removesuffix(".py")
        parts.setdefault(part, Density()).add(density)

    print(HEADER)
    total = Density()
    rest = list(parts)
    for ring, names in RINGS.items():
        of_ring = Density()
        for name in names:
            if name in parts:
                print(parts[name].row(f"  {name}"))
                of_ring.add(parts[name])
                rest.remove(name)
        print(of_ring.row(ring))
        total.add(of_ring)
    for name in rest:  # the root's __init__.py, and what the rings of this checkout do not know
        print(parts[name].row(f"  {name}"))
        total.add(parts[name])
    print(total.row("library"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
