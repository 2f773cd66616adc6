"""Licenses as the Hub knows them: its identifiers, the nearest one to a spelling, and the license of a base."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.constants import REPOCARD_NAME

from .card import EMBEDDED_BASES

HUB = "https://huggingface.co"

HUB_LICENSES = {
    "apache-2.0": "Apache license 2.0",
    "mit": "MIT",
    "openrail": "OpenRAIL license family",
    "bigscience-openrail-m": "BigScience OpenRAIL-M",
    "creativeml-openrail-m": "CreativeML OpenRAIL-M",
    "bigscience-bloom-rail-1.0": "BigScience BLOOM RAIL 1.0",
    "bigcode-openrail-m": "BigCode Open RAIL-M v1",
    "afl-3.0": "Academic Free License v3.0",
    "artistic-2.0": "Artistic license 2.0",
    "bsl-1.0": "Boost Software License 1.0",
    "bsd": "BSD license family",
    "bsd-2-clause": "BSD 2-clause Simplified license",
    "bsd-3-clause": "BSD 3-clause New or Revised license",
    "bsd-3-clause-clear": "BSD 3-clause Clear license",
    "c-uda": "Computational Use of Data Agreement",
    "cc": "Creative Commons license family",
    "cc0-1.0": "Creative Commons Zero v1.0 Universal",
    "cc-by-2.0": "Creative Commons Attribution 2.0",
    "cc-by-2.5": "Creative Commons Attribution 2.5",
    "cc-by-3.0": "Creative Commons Attribution 3.0",
    "cc-by-4.0": "Creative Commons Attribution 4.0",
    "cc-by-sa-3.0": "Creative Commons Attribution Share Alike 3.0",
    "cc-by-sa-4.0": "Creative Commons Attribution Share Alike 4.0",
    "cc-by-nc-2.0": "Creative Commons Attribution Non Commercial 2.0",
    "cc-by-nc-3.0": "Creative Commons Attribution Non Commercial 3.0",
    "cc-by-nc-4.0": "Creative Commons Attribution Non Commercial 4.0",
    "cc-by-nd-4.0": "Creative Commons Attribution No Derivatives 4.0",
    "cc-by-nc-nd-3.0": "Creative Commons Attribution Non Commercial No Derivatives 3.0",
    "cc-by-nc-nd-4.0": "Creative Commons Attribution Non Commercial No Derivatives 4.0",
    "cc-by-nc-sa-2.0": "Creative Commons Attribution Non Commercial Share Alike 2.0",
    "cc-by-nc-sa-3.0": "Creative Commons Attribution Non Commercial Share Alike 3.0",
    "cc-by-nc-sa-4.0": "Creative Commons Attribution Non Commercial Share Alike 4.0",
    "cdla-sharing-1.0": "Community Data License Agreement Sharing, Version 1.0",
    "cdla-permissive-1.0": "Community Data License Agreement Permissive, Version 1.0",
    "cdla-permissive-2.0": "Community Data License Agreement Permissive, Version 2.0",
    "wtfpl": "Do What The F*ck You Want To Public License",
    "ecl-2.0": "Educational Community License v2.0",
    "epl-1.0": "Eclipse Public License 1.0",
    "epl-2.0": "Eclipse Public License 2.0",
    "etalab-2.0": "Etalab Open License 2.0",
    "eupl-1.1": "European Union Public License 1.1",
    "eupl-1.2": "European Union Public License 1.2",
    "agpl-3.0": "GNU Affero General Public License v3.0",
    "gfdl": "GNU Free Documentation License family",
    "gpl": "GNU General Public License family",
    "gpl-2.0": "GNU General Public License v2.0",
    "gpl-3.0": "GNU General Public License v3.0",
    "lgpl": "GNU Lesser General Public License family",
    "lgpl-2.1": "GNU Lesser General Public License v2.1",
    "lgpl-3.0": "GNU Lesser General Public License v3.0",
    "isc": "ISC",
    "h-research": "H Research License",
    "intel-research": "Intel Research Use License Agreement",
    "lppl-1.3c": "LaTeX Project Public License v1.3c",
    "ms-pl": "Microsoft Public License",
    "apple-ascl": "Apple Sample Code license",
    "apple-amlr": "Apple Model License for Research",
    "mpl-2.0": "Mozilla Public License 2.0",
    "odc-by": "Open Data Commons License Attribution family",
    "odbl": "Open Database License family",
    "openmdw-1.0": "Open Model, Data & Weights License Agreement",
    "openrail++": "Open Rail++-M License",
    "osl-3.0": "Open Software License 3.0",
    "postgresql": "PostgreSQL License",
    "ofl-1.1": "SIL Open Font License 1.1",
    "ncsa": "University of Illinois/NCSA Open Source License",
    "unlicense": "The Unlicense",
    "zlib": "zLib License",
    "pddl": "Open Data Commons Public Domain Dedication and License",
    "lgpl-lr": "Lesser General Public License For Linguistic Resources",
    "deepfloyd-if-license": "DeepFloyd IF Research License Agreement",
    "fair-noncommercial-research-license": "FAIR Noncommercial Research License",
    "llama2": "Llama 2 Community License Agreement",
    "llama3": "Llama 3 Community License Agreement",
    "llama3.1": "Llama 3.1 Community License Agreement",
    "llama3.2": "Llama 3.2 Community License Agreement",
    "llama3.3": "Llama 3.3 Community License Agreement",
    "llama4": "Llama 4 Community License Agreement",
    "grok2-community": "Grok 2 Community License Agreement",
    "gemma": "Gemma Terms of Use",
    "unknown": "Unknown",
    "other": "Other",
}
"""The Hub's identifier -> full name, from the Hub's documentation (hub/repositories-licenses, 2026)."""
_SHORT = {"cc0": "cc0-1.0", "asl 2.0": "apache-2.0", "new bsd": "bsd-3-clause", "simplified bsd": "bsd-2-clause"}
"""Other names of licenses of which there is one version."""
_FILLING = re.compile(r"\b(the|licen[sc]ed?|agreement|family|version|international|unported|public|v\.?(?=\s*\d))\b")
_NO_LICENSES = ("other", "unknown")
_LONGEST_NAME = 96


@dataclass(frozen=True)
class License:
    """The license of a model as in the header of its card.

    Attributes:
        id: The Hub's identifier, such as `apache-2.0`, or `other`.
        name: Name of a license that is `other`.
        link: Address of the license's text.
    """

    id: str
    name: str | None = None
    link: str | None = None


def license_of_base(base_model: str | None, token: str | None = None, revision: str | None = None) -> License | None:
    """Returns the license in the card of a base, which a model that was trained from it inherits.

    Args:
        base_model: Hub id of the base, or the name of an embedded one. None has no license.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.
        revision: Revision of the base; None means `main`.

    Returns:
        The license, with the name and the link of the base's card. None if the card names none or cannot be read.
    """
    if base_model is None:
        return None
    if base_model in EMBEDDED_BASES or base_model in EMBEDDED_BASES.values():
        return License("apache-2.0")
    try:
        path = hf_hub_download(base_model, REPOCARD_NAME, revision=revision, token=token)
        text = Path(path).read_text(encoding="utf-8-sig")
        header = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no network, no repository, no card
        return None
    return _license_in(header, base_model, revision)


def license_id(text: str) -> str | None:
    """Returns the Hub's identifier of a license that is spelled in another way, such as `Apache 2.0` or `MIT License`.

    Returns:
        The identifier; None if it is not certain which license is meant.
    """
    if text in HUB_LICENSES:
        return text
    return _spellings().get(_folded(text))


def nearest_license(text: str) -> str | None:
    """Returns the Hub's identifier that is nearest to what somebody wrote. None if none is near."""
    certain = license_id(text)
    if certain is not None:
        return certain
    spellings = _spellings()
    without_suffix = re.sub(r"[\s-](or[\s-]later|only)$", "", text.strip(), flags=re.IGNORECASE)  # SPDX's
    named = [spelling for spelling, id in spellings.items() if id not in _NO_LICENSES]
    near = get_close_matches(_folded(without_suffix), named, n=1, cutoff=0.6)
    return spellings[near[0]] if near else None


def license_name(text: str) -> str:
    """Returns a name for the header's `license_name` of a license in free words: lower case, with dashes."""
    words = re.findall(r"[a-z0-9.]+", text.lower())
    return "-".join(words)[:_LONGEST_NAME].strip("-.") or "custom"


def _license_in(header: Mapping[str, Any], base_model: str, revision: str | None) -> License | None:
    """Returns the license in the header of the card of a base."""
    stated = header.get("license")
    names = [str(name) for name in stated] if isinstance(stated, list) else [str(stated or "")]
    names = [name for name in names if name]
    if not names:
        return None
    name, link = header.get("license_name"), header.get("license_link")
    name = str(name) if name else None
    link = _absolute(str(link), base_model, revision) if link else None
    if len(names) == 1:
        return License(names[0], name, link)
    # A model's header has one license, and a base with several says in its card which holds for what.
    return License("other", name or license_name(" ".join(names)), link or f"{HUB}/{base_model}")


def _absolute(link: str, base_model: str, revision: str | None) -> str:
    """Returns a link of the base's card as an address, since a file of the base is not in the repository of the run."""
    if "://" in link:
        return link
    return f"{HUB}/{base_model}/blob/{revision or 'main'}/{link.lstrip('./')}"


@cache
def _spellings() -> dict[str, str]:
    """Returns the spellings of all licenses, folded -> identifier."""
    spellings = {_folded(short): id for short, id in _SHORT.items()}
    for id, full_name in HUB_LICENSES.items():
        spellings[_folded(full_name)] = id
    for id in HUB_LICENSES:
        spellings[_folded(id)] = id
    return spellings


def _folded(text: str) -> str:
    """Returns a name without case, filling words and punctuation, to compare spellings."""
    plain = re.sub(r"[\s_,;()\"'/-]+", " ", text.lower())
    plain = re.sub(r"(?<=[a-z])v?(?=\d)", " ", plain)  # gplv3 and llama3.1 as gpl 3 and llama 3.1
    plain = _FILLING.sub(" ", plain)
    plain = re.sub(r"\b(\d+)\.0\b", r"\1", plain)
    return "".join(plain.split())
