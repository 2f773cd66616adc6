"""Lines of code of the library, without docstrings, comments and blank lines; `make lint` holds them under a limit.

python tests/library_size.py LIMIT
"""

import ast
import sys
import tokenize
from pathlib import Path

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(path: Path) -> int:
    """Lines of one file that hold code."""
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in LAYOUT | {tokenize.ENCODING}]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


if __name__ == "__main__":
    files = sorted(Path("hf_rlhf_ext").rglob("*.py"))
    code = sum(map(code_lines, files))
    physical = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    print(f"library: {code} lines of code ({physical} with docstrings, comments and blanks), limit {sys.argv[1]}")
    sys.exit(code >= int(sys.argv[1]))
