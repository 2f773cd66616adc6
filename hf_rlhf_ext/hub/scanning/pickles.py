"""Recognizes pickles by their content, whatever their name."""

import io
import pickletools
import re
import zipfile

_RUNS_CODE = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE", "BUILD"}  # pickle opcodes that run code
_PICKLE_HEADER = re.compile(rb"\x80[\x02-\x05]")  # opcode PROTO, at the start of pickles with protocol 2 to 5


def is_pickle(content: bytes) -> bool:
    """True for a pickle that runs code, with any protocol, or an archive that contains one (written by torch.save)."""
    if _PICKLE_HEADER.match(content):
        return True
    try:
        stream = io.BytesIO(content)
        if zipfile.is_zipfile(stream):
            names = zipfile.ZipFile(stream).namelist()
            return any(name.endswith(".pkl") for name in names)
        return _runs_code(content)
    except Exception:  # zipfile and pickletools raise many kinds of errors for other content
        return False


def _runs_code(content: bytes) -> bool:
    """True if the whole content is a pickle (with protocol 0 or 1, which has no header) that calls something."""
    names = set()
    end = None
    for opcode, _, position in pickletools.genops(content):
        names.add(opcode.name)
        end = position
    # Text may look like opcodes by chance, up to a period, which ends a pickle.
    last = len(content.rstrip()) - 1
    return end == last and not _RUNS_CODE.isdisjoint(names)
