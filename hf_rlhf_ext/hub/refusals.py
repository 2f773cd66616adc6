"""What the Hub refuses, found before a run is trained or a file is uploaded: names, licenses and headers of cards."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

from ..errors import UserError, first_line
from .licenses import HUB_LICENSES, nearest_license

_MANY = re.compile(r"\[([^\]]{80,})\]")
"""A long list in the Hub's reason, such as all licenses."""
_REQUEST_ID = re.compile(r"\s*\((?:Request ID|Amzn Trace ID|Amz CF ID): [^)]*\)")
_ADDRESS = re.compile(r"(?:https?://[^/]+/(?:datasets/)?)?([^/:]+)/([^/:]+)/(?:tree|blob|resolve)/")
"""Address of a page of a repository, or the end of one."""
_LONGEST_NAME = 96
_RULE = f"letters, digits, - _ and ., no -- or .., at most {_LONGEST_NAME} characters"


def check_before_training(
    repo_id: str | None = None,
    *,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    header: str | Mapping[str, Any] | None = None,
    repo_type: str = "model",
    token: str | None = None,
) -> None:
    """Refuses what the Hub would refuse after training, before anything is loaded.

    Args:
        repo_id: `owner/name`, or a name in one's own namespace. None is not checked.
        license: License that the user chose. None is not checked, since that of a base on the Hub is accepted there.
        license_name: Name of a license that is `other`.
        license_link: Address of the license, if it is `other`.
        header: Header of the card, as a mapping or as the text of a card. The Hub is asked, if it can be reached.
        repo_type: `"model"` or `"dataset"`.
        token: Access token, for a Hub that wants one to check a header.

    Raises:
        UserError: The Hub would refuse one of them. The message has the Hub's reason and a value that works.
    """
    if repo_id is not None:
        check_repo_name(repo_id)
    if license is not None:
        check_license(license, name=license_name, link=license_link, repo_type=repo_type, token=token)
    if header is not None:
        check_header(header, repo_type=repo_type, token=token)


# Names


def check_repo_name(repo_id: str) -> None:
    """Refuses a name that no repository can have.

    Raises:
        UserError: The name is not possible. The message has one that is.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(
            f"push_to_hub: {repo_id!r} cannot be the name of a repository ({_RULE}): choose one such as "
            f"{possible_name(repo_id)} (hub_model_id, or --repo of hf-rlhf push)."
        ) from None


def possible_name(repo_id: str) -> str:
    """Returns the name of a repository that is possible and near to one that is not."""
    address = _ADDRESS.match(str(repo_id))
    if address:
        return f"{_possible_part(address[1])}/{_possible_part(address[2])}"
    parts = [_possible_part(part) for part in str(repo_id).strip("/").split("/")]
    parts = [part for part in parts if part]
    return "/".join(parts[-2:]) or "my-model"


def _possible_part(text: str) -> str:
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^\w.]+", "-", ascii_text, flags=re.ASCII)
    plain = re.sub(r"\.{2,}", ".", plain)
    plain = re.sub(r"(\.git)+$", "", plain[:_LONGEST_NAME])
    return re.sub(r"^[-.]+|[-.]+$", "", plain)


# Licenses


def check_license(
    license: str,
    *,
    name: str | None = None,
    link: str | None = None,
    repo_type: str = "model",
    token: str | None = None,
) -> None:
    """Refuses a license that the Hub does not know.

    Args:
        license: The Hub's identifier, such as `apache-2.0`.
        name: Name of a license that is `other`.
        link: Address of the license, if it is `other`.
        repo_type: `"model"` or `"dataset"`.
        token: Access token, for a Hub that wants one to check a header.

    Raises:
        UserError: The Hub does not know the license, or there is a name for a license that is not `other`.
    """
    if license == "other" and not name:
        raise UserError(
            "license: `other` says nothing without its name: pass license_name (such as my-license-1.0), and "
            "license_link, the address of its text."
        )
    if license in HUB_LICENSES:
        return
    # The Hub may know more licenses than this version of the library.
    reasons = reasons_of_hub({"license": license}, repo_type=repo_type, token=token)
    if reasons == []:
        return
    near = nearest_license(license)
    advice = (
        f"did you mean {near}?" if near else "for another license, pass `other` with license_name and license_link."
    )
    reason = f" ({shortened(reasons[0])})" if reasons else ""
    raise UserError(f"license: the Hub has no license {license!r}{reason}: {advice}")


# Headers


def check_header(header: str | Mapping[str, Any], *, repo_type: str = "model", token: str | None = None) -> None:
    """Refuses the header of a card that the Hub would refuse, with the Hub's own reason.

    A Hub that cannot be reached is not an error here: the push itself reports that.

    Args:
        header: Header as a mapping, or the text of a card.
        repo_type: `"model"` or `"dataset"`.
        token: Access token, for a Hub that wants one.

    Raises:
        UserError: The Hub refuses the header.
    """
    reasons = reasons_of_hub(header, repo_type=repo_type, token=token)
    if not reasons:
        return
    license = _license_in(header)
    near = None
    if license is not None and license not in HUB_LICENSES and any("license" in reason for reason in reasons):
        near = nearest_license(license)
    found = "; ".join(shortened(reason) for reason in reasons)
    advice = f" Did you mean {near}?" if near else ""
    raise UserError(f"README.md: the Hub refuses the header of the card: {found.rstrip('.')}.{advice}")


def reasons_of_hub(
    header: str | Mapping[str, Any], *, repo_type: str = "model", token: str | None = None
) -> list[str] | None:
    """Asks the Hub about the header of a card.

    Returns:
        The Hub's reasons to refuse the header, none if it accepts it. None if the Hub cannot be asked.
    """
    text = header if isinstance(header, str) else f"---\n{yaml.safe_dump(dict(header), allow_unicode=True)}---\n"
    try:
        response = get_session().post(
            f"{constants.ENDPOINT}/api/validate-yaml",
            json={"content": text, "repoType": repo_type},
            headers=build_hf_headers(token=token),
        )
        answer = response.json()
    except Exception:  # no network, no token, or a Hub without this check
        return None
    if response.status_code == 200:
        return []
    if response.status_code != 400 or not isinstance(answer, dict):
        return None
    reasons = [str(error.get("message", error)) for error in answer.get("errors", ())]
    return reasons or [str(answer.get("error", "no reason given"))]


def reason_of(error: BaseException) -> str:
    """Returns the reason of an error of the Hub or its client in one line, with what the Hub answered.

    The first line of such an error has the request, and the lines after it have the reason.
    """
    lines = [_REQUEST_ID.sub("", line).strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line]
    if isinstance(error, HfHubHTTPError) and lines:
        request = lines[0].rstrip(". :")
        answer = " ".join((error.server_message or "").split()).rstrip(". ")
        return request if answer in request else f"{request}: {shortened(answer)}"
    if lines and lines[0].startswith("Invalid metadata"):
        return shortened(f"{lines[0].rstrip('.')}: {'; '.join(line.removeprefix('- ') for line in lines[1:])}")
    return first_line(error)


def shortened(reason: str) -> str:
    """Returns a reason of the Hub with long lists of values cut, in one line."""

    def cut(match: re.Match) -> str:
        values = match[1].split(", ")
        return f"[{', '.join(values[:3])}, … {len(values) - 3} more]" if len(values) > 4 else match[0]

    return _MANY.sub(cut, " ".join(reason.split()))


def _license_in(header: str | Mapping[str, Any]) -> str | None:
    if isinstance(header, str):
        match = REGEX_YAML_BLOCK.search(header)
        try:
            header = yaml.safe_load(match.group(2)) if match else {}
        except yaml.YAMLError:
            return None
    license = header.get("license") if isinstance(header, Mapping) else None
    return license if isinstance(license, str) else None
