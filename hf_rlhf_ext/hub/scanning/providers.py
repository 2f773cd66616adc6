"""Tokens of providers, by the rules of detect-secrets. Nothing is sent: its checks at the providers are off."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from detect_secrets.constants import VerifiedResult
from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.plugins.base import RegexBasedDetector

_LEFT_OUT = {
    "Base64 High Entropy String",  # entropy: alarms on digests and ids
    "Hex High Entropy String",
    "Secret Keyword",  # alarms on options such as `eos_token`
    "Basic Auth Credentials",  # passes any line with an example domain; ours passes placeholders
    "Private Key",  # opens files by their name
}


class Token(NamedTuple):
    """A token in a line: what it looks like, and its position."""

    name: str
    start: int
    end: int


def provider_tokens(line: str) -> Iterator[Token]:
    """Yields the tokens in a line. A digit is required: without one it is a long identifier."""
    for plugin in _plugins():
        # The values of its findings may be only a prefix ("ghp"), so the positions are those of its patterns.
        if not plugin.analyze_line(filename="text", line=line):
            continue
        for pattern in plugin.denylist:
            for match in pattern.finditer(line):
                if any(character.isdigit() for character in match[0]):
                    yield Token(plugin.secret_type, match.start(), match.end())


@cache
def _plugins() -> list[RegexBasedDetector]:
    plugins = []
    for secret_type, plugin in sorted(get_mapping_from_secret_type_to_class().items()):
        if secret_type not in _LEFT_OUT:
            instance = plugin()
            instance.verify = _unverified  # would ask the provider, with the secret
            plugins.append(instance)
    return plugins


def _unverified() -> VerifiedResult:
    return VerifiedResult.UNVERIFIED
