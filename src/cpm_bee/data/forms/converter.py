"""Rows of one file -> records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cpm_bee import records
from cpm_bee.data.forms import recognition
from cpm_bee.data.forms.choices import (
    CCPM_QUESTION,
    answer_number,
    choice_record,
    is_marked,
    lettered,
    options_of,
    split_marked,
)
from cpm_bee.data.forms.dialogue import (
    dialogue_records,
    history_of,
    history_record,
    messages_of,
)
from cpm_bee.data.forms.names import Columns, normal
from cpm_bee.data.forms.options import AUTO, ConversionOptions
from cpm_bee.data.forms.rows import json_kind
from cpm_bee.data.forms.values import BadRow, Texts, structure
from cpm_bee.records import ANSWER, Record

# A classification with more labels has no options, and the label's name for an answer.
MAX_LABEL_OPTIONS = 20


class Converter:
    """Makes records of the rows of a file.

    Args:
        where: the place of the first row, for messages.
        first: the first row, which tells the form and the names of the keys.
        options: the flags.
        columns, tags: of dataset_info.json.
        form: the form that it gives; None to recognise it.
        escape: whether the texts of data that are records already are plain.

    Attributes:
        form: the form of the rows.
        labels: the names of the labels of a classification in their order; None if they are not
            known yet, empty if there are too many for options.
        unused: the keys that no record has.

    Raises:
        InputError: the first row is of no known form.
    """

    def __init__(
        self,
        where: str,
        first: Any,
        options: ConversionOptions,
        *,
        columns: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        form: str | None = None,
        escape: bool = False,
    ) -> None:
        self._options = options
        self._columns = Columns({**(columns or {}), **(options.columns or {})})
        self._tags = tags
        self._escape = escape
        separator = options.join_lists
        if separator is not None:
            separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        self._texts = Texts(options.numbers_as_text, separator)
        wanted = options.form if options.form != AUTO else form
        recognised = wanted or recognition.recognise(first, self._columns)
        if recognised is None or not isinstance(first, dict):
            raise recognition.unknown_form(where, first, self._columns)
        self.form = recognised
        self.labels = list(options.label_names.values()) if options.label_names else None
        used = recognition.USED.get(self.form, ())
        # The keys of the first row; what is not in it may have any name of its role in others.
        self._keys = self._columns.find(first, used)
        needed = {*(options.columns or {}), *recognition.NEEDED.get(self.form, ())}
        missing = [
            role
            for role in self._columns.given
            if role in used and role in needed and role not in self._keys
        ]
        if missing:
            named = ", ".join(f"{role} ({self._columns.given[role]!r})" for role in missing)
            raise recognition.unknown_form(
                f"{where}: has no column for {named}", first, self._columns
            )
        self.unused: set[str] = set()

    def convert(self, row: Any) -> list[Record]:
        """The records of a row, valid and with texts escaped.

        Raises:
            BadRow: it is none of the form, or its records are not valid.
        """
        if not isinstance(row, dict):
            raise BadRow(f"expected an object, this is {json_kind(row)}")
        makers: dict[str, Callable[[dict[str, Any]], Iterator[dict[str, Any]]]] = {
            recognition.RECORDS: self._record,
            recognition.ALPACA: self._alpaca,
            recognition.DIALOGUE: self._dialogue,
            recognition.CHOICES: self._choices,
            recognition.CLASSIFICATION: self._classification,
            recognition.QUESTION_ANSWER: self._question,
        }
        is_plain = self.form != recognition.RECORDS or self._escape
        found = []
        for record in makers[self.form](row):
            record = records.escape_texts(record) if is_plain else record
            if reasons := records.validate(record):
                raise BadRow("; ".join(reasons))
            found.append(record)
        return found

    # -------------------------------------------------------------- keys of a row

    def _key(self, row: Mapping[str, Any], role: str) -> str | None:
        key = self._keys.get(role)
        # The forms of choices may be mixed; elsewhere another name is more likely a mistake.
        if key not in row and self.form == recognition.CHOICES and role not in self._columns.given:
            return self._columns.find(row, recognition.USED[self.form]).get(role)
        if key is None:
            key = self._columns.find(row, recognition.USED[self.form]).get(role)
            if key in self._keys.values():
                return None
        return key

    def _value(self, row: Mapping[str, Any], role: str, *, needed: bool = False) -> Any:
        """The value of a role; None if the row has none.

        Raises:
            BadRow: the first row has the key of a role that is needed, and this one lacks it.
        """
        key = self._key(row, role)
        if needed and (key is None or key not in row):
            name = self._keys.get(role, role)
            raise BadRow(f"has no {name!r}; its keys: {', '.join(map(repr, row))}")
        return None if key is None else row.get(key)

    def _text(self, row: Mapping[str, Any], role: str, *, needed: bool = False) -> str:
        value = self._value(row, role, needed=needed)
        return self._texts.of(value, repr(self._key(row, role)))

    def _filled(self, row: Mapping[str, Any], role: str) -> str:
        """The text of a role that must not be empty."""
        text = self._text(row, role, needed=True)
        if not text.strip():
            raise BadRow(f"{self._key(row, role)!r} is empty")
        return text

    def _answer(self, row: Mapping[str, Any], role: str) -> Any:
        """The answer of a row; of several right ones the first. None if the file has none."""
        # Data to write answers for has no such key in any row.
        value = structure(self._value(row, role, needed=role in self._keys))
        if isinstance(value, dict) and isinstance(value.get("text"), list):
            value = value["text"]  # SQuAD: {"text": [...], "answer_start": [...]}
        if isinstance(value, list) and self._texts.separator is None:
            value = value[0] if value else None
            value = value.get("text") if isinstance(value, dict) else value
        return value

    def note_unused(self, row: Mapping[str, Any]) -> None:
        """Note the keys of a row that its records do not have."""
        if self.form != recognition.RECORDS:
            roles = recognition.USED[self.form]
            used = set(self._keys.values()) | set(self._columns.find(row, roles).values())
            if self.form == recognition.CHOICES:
                used |= set(lettered(row).values())
            self.unused |= set(row) - used

    # -------------------------------------------------------------- the forms

    def _record(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        def with_texts(node: Any, name: str) -> Any:
            if isinstance(node, dict):
                return {key: with_texts(value, repr(key)) for key, value in node.items()}
            return self._texts.of(node, name) if isinstance(node, (int, float, list)) else node

        if ANSWER not in row:
            raise BadRow(f'there is no "{ANSWER}" (use "" where the answer is not known)')
        yield with_texts(row, "the record")

    def _alpaca(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        role = "instruction" if "instruction" in self._keys else "input"
        record: dict[str, Any] = {}
        for name in ("system", "tools"):
            if text := self._text(row, name):
                record[name] = text
        if history := history_of(self._value(row, "history"), self._texts):
            record["history"] = history_record(history)
        record["prompt" if role == "instruction" else "input"] = self._filled(row, role)
        if role == "instruction" and (text := self._text(row, "input")):
            record["input"] = text
        answer = self._texts.of(self._answer(row, "output"), repr(self._key(row, "output")))
        yield {**record, ANSWER: answer}

    def _dialogue(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        messages = messages_of(self._value(row, "messages", needed=True), self._texts, self._tags)
        tools = self._value(row, "tools")
        if isinstance(tools, (list, dict)):
            tools = records_json(tools)
        yield from dialogue_records(
            messages,
            system=self._text(row, "system"),
            tools=self._texts.of(tools, "'tools'"),
            last_only=self._options.turns == "last",
        )

    def _question(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        context = self._text(row, "context")
        record: dict[str, Any] = {"input": context} if context else {}
        answer = self._texts.of(self._answer(row, "answer"), repr(self._key(row, "answer")))
        yield {**record, "question": self._filled(row, "question"), ANSWER: answer}

    def _choices(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        question = self._text(row, "question") or self._options.question or ""
        context_key = self._key(row, "context")
        text = self._text(row, "context")
        if is_marked(text):
            try:
                text, parts = split_marked(text)
            except BadRow as error:
                raise BadRow(f"{context_key!r} {error}") from None
            options = options_of(parts, self._texts)
        elif self._key(row, "choices") is not None:
            options = options_of(self._value(row, "choices", needed=True), self._texts)
        else:
            letters = lettered(row)
            options = options_of({name: row[key] for name, key in letters.items()}, self._texts)
        if not question and (
            is_marked(row.get(context_key or "")) or normal(context_key) == "translation"
        ):
            question = CCPM_QUESTION
        if not (text.strip() or question.strip()):
            raise BadRow("has neither a text nor a question")
        answer = answer_number(self._answer(row, "answer"), options, self._options.answer_as)
        yield choice_record(text, question, list(options.values()), answer)

    def label(self, row: Any) -> str | None:
        """The name of the label of a classification's row; None if it has none.

        Raises:
            BadRow: it is not a text, or has no name in `--label-names`.
        """
        value = self._answer(row, "label")
        if value is None or value == "":
            return None
        names = self._options.label_names
        if names is None:
            return self._texts.of(value, repr(self._key(row, "label"))).strip() or None
        key = str(value).strip() if isinstance(value, (int, str)) else None
        if key not in names and key not in names.values():
            raise BadRow(f"the label {value!r} is none of --label-names: {', '.join(names)}")
        return names.get(str(key), str(key))

    def _classification(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        record: dict[str, Any] = {"input": self._filled(row, "text")}
        if self._key(row, "text2") is not None:
            second = self._filled(row, "text2")
            record = {"sentence1": record["input"], "sentence2": second}
        label = self.label(row)
        labels = self.labels or []
        if labels:
            record["options"] = {f"<option_{i}>": name for i, name in enumerate(labels)}
        if self._options.question:
            record["question"] = self._options.question
        answer = label or ""
        if labels and label is not None:
            answer = f"<option_{labels.index(label)}>"
        yield {**record, ANSWER: answer}


def records_json(value: Any) -> str:
    """A structure that the model reads as text, such as a list of tools."""
    import json

    return json.dumps(value, ensure_ascii=False)
