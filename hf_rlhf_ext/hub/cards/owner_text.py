"""Keeps what the owner of a model wrote into its card: the generated part of the card stands between two marks.

The second mark has digests of what was generated, so that a later push sees what the owner changed in between.
"""

import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from .card_parts import OwnedCard, digest, plain, split_header, text_of
from .fences import paragraphs
from .foreign_cards import (
    KEYS_BEFORE_MARKS,
    is_filled_form,
    is_form,
    is_from_before_marks,
    lines_of_owner,
    record_of_form,
    sections_of_owner,
)
from .owner_header import digests_of, merged_headers

__all__ = ["CardMerge", "OwnedCard", "digest", "marked", "merge_card", "merged", "save_card"]


def marked(card: str) -> str:
    """Returns a generated card with marks around its text. A card that has them is returned unchanged."""
    parsed = OwnedCard.parse(card)
    if parsed.part is not None:
        return card
    record = {name: digests_of(name, value) for name, value in parsed.header.items()}
    generated = digest(parsed.before)
    return replace(parsed, before="", part=parsed.before, generated=generated, record=record).to_text()


def save_card(path: str | Path, card: str) -> None:
    """Writes a generated card between marks. What the owner wrote into the card that is there stays.

    Args:
        path: The card, `README.md`.
        card: The generated card, with or without marks.
    """
    path = Path(path)
    earlier = text_of(path) if path.is_file() else None
    text, said = merged(marked(card), earlier, where=str(path))
    for line in said:
        print(f"note: {line}", file=sys.stderr)
    path.write_text(text, encoding="utf-8")


def merged(
    card: str | None,
    earlier: str | None,
    *,
    where: str,
    asked: Collection[str] = (),
    pushed: Collection[str] = (),
) -> tuple[str | None, list[str]]:
    """Merges a new card with an earlier one, so that nothing is lost that the owner wrote into one of them.

    Args:
        card: The new card. None if what is pushed has no card: only the owner's text of the earlier one stays.
        earlier: The card that is there. None if there is none.
        where: Where the earlier card is, for messages.
        asked: Keys of the header that the user gave now, so that the owner's earlier ones do not win.
        pushed: Digests of the owner's paragraphs in the card of the last push from this folder, see `CardMerge`.

    Returns:
        The card, None if there is to be none, and what to say of it: at most one line for each matter.
    """
    if earlier is None or is_form(split_header(plain(earlier))[2]):
        return card, []
    old, said = _parsed(earlier, where)
    if card is None:
        return _without_part(old, earlier), said
    new = OwnedCard.parse(card)
    if new.part is None:  # a card that the owner wrote in the folder
        if _digests(old.owner_text) - _digests(new.owner_text) - set(pushed):
            said.append(f"README.md of the folder replaces that of {where}, which is kept in its history.")
        return card, said
    if old.part is None and old.before and not said and digest(old.before) != digest(new.owner_text):
        said.append(f"README.md of {where} has text of its own, which stays: the generated part is below it.")
    before, after, both = _owner_text(new, old, set(pushed))
    if both:
        said.append(f"README.md was edited in the folder and in {where}: both texts are kept, so look it over.")
    kept = new
    if old.is_edited and not new.is_edited:
        kept = old
        said.append(
            f"README.md of {where}: its generated part was edited, so it stays as it is: to get the new one, delete "
            "the text between the two marks `hf_rlhf_ext`."
        )
    header = merged_headers(new.header, new.record, old.header, old.record, asked)
    result = replace(new, header=header, header_text=None, before=before, after=after)
    result = replace(result, part=kept.part, generated=kept.generated)
    for source in (new, old):  # as it was written, with comments
        if header == source.header and source.header_text is not None:
            result = replace(result, header_text=source.header_text)
            break
    return result.to_text(), said


class CardMerge:
    """Merges the card of a push with that in the repository, as `client.push_files` asks for.

    Args:
        asked: Keys of the header that the user gave for this push.
        pushed: Digests of the owner's paragraphs in the folder's card at its last push. What the folder or the
            repository no longer has of them was removed there, so that it leaves the card.

    Attributes:
        paragraphs: These digests for this push. None if nothing was merged yet.
    """

    def __init__(self, asked: Collection[str] = (), pushed: Collection[str] = ()):
        self.asked = asked
        self.pushed = pushed
        self.paragraphs: list[str] | None = None

    def __call__(self, card: bytes | Path | None, stored: bytes | None) -> tuple[bytes | None, list[str]]:
        """Returns the content of `README.md` to commit, None for no such file, and lines to say."""
        new = None if card is None else text_of(card)
        earlier = None if stored is None else text_of(stored)
        text, said = merged(new, earlier, where="the repository", asked=self.asked, pushed=self.pushed)
        self.paragraphs = sorted(_digests(OwnedCard.parse(new or "").owner_text))
        return (None if text is None else text.encode()), said


def merge_card(card: bytes | Path | None, stored: bytes | None) -> tuple[bytes | None, list[str]]:
    """As `CardMerge`, for a push without options."""
    return CardMerge()(card, stored)


def _parsed(earlier: str, where: str) -> tuple[OwnedCard, list[str]]:
    """Reads the card that is there, and says what of it cannot be read.

    Cards of versions without marks are taken apart at their headings, and PEFT's form at its lines.
    """
    card = OwnedCard.parse(earlier)
    if is_filled_form(card.before):
        record = card.record or record_of_form(card.header)
        # The part is empty, so that it gives way to the new one without a word.
        card = replace(card, before=lines_of_owner(card.before), part=card.part or "", record=record)
        return card, []
    if card.part is not None:
        if card.record and card.header_text is None:
            said = f"README.md of {where} has no header that can be read, so a new one is written."
            return replace(card, record={}), [said]
        return card, []
    if card.lost_mark:
        said = (
            f"README.md of {where} has only one of the two marks `hf_rlhf_ext`, so the earlier generated part counts "
            "as your text: delete what you do not need."
        )
        return card, [said]
    if not is_from_before_marks(card.header, card.before):
        return card, []
    own = sections_of_owner(card.before)
    record = {name: digests_of(name, value) for name, value in card.header.items() if name in KEYS_BEFORE_MARKS}
    said = f"README.md of {where} was written by an earlier version, and is replaced"
    said += ", but for the sections that are yours." if own else "."
    return replace(card, before="", part="", after=own, record=record), [said]


# Merging


def _without_part(card: OwnedCard, text: str) -> str | None:
    """The card without its generated part, which describes other weights. None if the owner wrote nothing."""
    if card.part is None or card.is_edited:
        return text
    header = merged_headers({}, {}, card.header, card.record)
    if not header and not card.owner_text:
        return None
    return replace(card, header=header, header_text=None, part="", generated="", record={}).to_text()


def _owner_text(new: OwnedCard, old: OwnedCard, pushed: set[str]) -> tuple[str, str, bool]:
    """Merges the owner's text of two cards, paragraph by paragraph.

    Returns:
        The text above and below the generated part, and whether different texts were added in both.
    """
    if not new.owner_text:
        return old.before, old.after, False
    here, there = _digests(new.owner_text), _digests(old.owner_text)
    removed = (pushed - here) | (pushed - there if there else set())
    if there <= pushed:  # nothing was added there, so that the folder's order stays
        return _without(new.before, removed), _without(new.after, removed), False
    # A paragraph that was moved to the other side of the part is not repeated.
    before = [_without(old.before, removed), _without(new.before, there | removed)]
    after = [_without(old.after, removed), _without(new.after, there | removed)]
    both = bool(here - there - pushed) and bool(there - here - pushed)
    return "\n\n".join(filter(None, before)), "\n\n".join(filter(None, after)), both


def _digests(text: str) -> set[str]:
    return {digest(paragraph) for paragraph in paragraphs(text)}


def _without(text: str, removed: Collection[str]) -> str:
    """The text without the paragraphs that have these digests."""
    all_of_it = paragraphs(text)
    kept = [paragraph for paragraph in all_of_it if digest(paragraph) not in removed]
    return text if len(kept) == len(all_of_it) else "\n\n".join(kept)
