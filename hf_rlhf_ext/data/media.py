"""Pictures, sound and film in data, which a text model cannot read: found in columns and in the parts of messages."""

from typing import Any

from datasets import Audio, Dataset, Features, Image, LargeList, List, Video

from ..errors import UserError

MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that are a part of the prompt, which a text model cannot read."""
MEDIA_FIELDS = frozenset(
    "image images image_url input_image video videos video_url audio audios audio_url input_audio file".split()
)
"""Fields of a message or of one of its parts with something that is not text."""
TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of parts that are text."""


def media_of_message(message: dict[str, Any]) -> str | None:
    """Returns what a message holds that is not text, such as "image", or None."""
    records = [message]
    if isinstance(message.get("content"), list):
        records += [part for part in message["content"] if isinstance(part, dict)]
    for record in records:
        kind = record.get("type")
        if record is not message and kind in MEDIA_FIELDS:
            return kind
        field = media_field(record)
        if field is not None:
            return field
    return None


def media_field(record: dict[str, Any]) -> str | None:
    """Returns the field of a message, or of one of its parts, that holds something that is not text, or None."""
    for field in sorted(MEDIA_FIELDS.intersection(record)):
        if record[field]:
            return field
    return None


def text_of_parts(content: Any) -> str | None:
    """Returns the joined text of a list of text parts, or None for anything else."""
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)
        if not is_text:
            return None
        texts.append(part["text"])
    return "".join(texts)


def refuse_media_columns(dataset: Dataset, *, where: str) -> None:
    """Raises `UserError` if a dataset has pictures, sound or film in a column that TRL adds to the prompt.

    Columns without any value are no mistake, as a mixture of datasets may have them.
    """
    for column in MEDIA_COLUMNS:
        if column in dataset.column_names and _has_values(dataset, column):
            raise UserError(
                f"{where}: images, audio and video are not supported, but there is a column {column!r}: use a text "
                f"dataset, or if the prompts do not need it, dataset.remove_columns({column!r})."
            )


def _has_values(dataset: Dataset, column: str) -> bool:
    features = dataset.features or Features()
    feature = features.get(column)
    while isinstance(feature, List | LargeList):
        feature = feature.feature
    if isinstance(feature, Image | Audio | Video):  # reading them would decode every file
        return True
    return any(value is not None and value != [] and value != "" for value in dataset[column])
