from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("protocol_version",)
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol_version", "scorer", "setup", "example_problem", "seconds_without_progress")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    SETUP_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    SECONDS_WITHOUT_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    scorer: str
    setup: Setup
    example_problem: str
    seconds_without_progress: float
    def __init__(self, protocol_version: _Optional[int] = ..., scorer: _Optional[str] = ..., setup: _Optional[_Union[Setup, _Mapping]] = ..., example_problem: _Optional[str] = ..., seconds_without_progress: _Optional[float] = ...) -> None: ...

class Setup(_message.Message):
    __slots__ = ("options", "defaults")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class DefaultsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    options: _containers.ScalarMap[str, str]
    defaults: _containers.ScalarMap[str, str]
    def __init__(self, options: _Optional[_Mapping[str, str]] = ..., defaults: _Optional[_Mapping[str, str]] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("prompts", "metadata_json", "with_notes")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    WITH_NOTES_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedScalarFieldContainer[str]
    metadata_json: _containers.RepeatedScalarFieldContainer[str]
    with_notes: bool
    def __init__(self, prompts: _Optional[_Iterable[str]] = ..., metadata_json: _Optional[_Iterable[str]] = ..., with_notes: _Optional[bool] = ...) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("problems", "notes")
    class ProblemsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    class NotesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    problems: _containers.ScalarMap[int, str]
    notes: _containers.ScalarMap[int, str]
    def __init__(self, problems: _Optional[_Mapping[int, str]] = ..., notes: _Optional[_Mapping[int, str]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("header", "pixels")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    header: Header
    pixels: bytes
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., pixels: _Optional[bytes] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("protocol_version", "batch_id", "count", "height", "width", "pixel_bytes", "prompts", "metadata_json")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    PIXEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    batch_id: int
    count: int
    height: int
    width: int
    pixel_bytes: int
    prompts: _containers.RepeatedScalarFieldContainer[str]
    metadata_json: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol_version: _Optional[int] = ..., batch_id: _Optional[int] = ..., count: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., pixel_bytes: _Optional[int] = ..., prompts: _Optional[_Iterable[str]] = ..., metadata_json: _Optional[_Iterable[str]] = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ("batch_id", "score", "raw", "reasons", "seconds_receiving", "seconds_queued", "seconds_scoring", "details")
    class RawEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: FloatList
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[FloatList, _Mapping]] = ...) -> None: ...
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_RECEIVING_FIELD_NUMBER: _ClassVar[int]
    SECONDS_QUEUED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SCORING_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    score: _containers.RepeatedScalarFieldContainer[float]
    raw: _containers.MessageMap[str, FloatList]
    reasons: _containers.RepeatedScalarFieldContainer[str]
    seconds_receiving: float
    seconds_queued: float
    seconds_scoring: float
    details: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, batch_id: _Optional[int] = ..., score: _Optional[_Iterable[float]] = ..., raw: _Optional[_Mapping[str, FloatList]] = ..., reasons: _Optional[_Iterable[str]] = ..., seconds_receiving: _Optional[float] = ..., seconds_queued: _Optional[float] = ..., seconds_scoring: _Optional[float] = ..., details: _Optional[_Iterable[str]] = ...) -> None: ...

class FloatList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...
