"""Text columns of Arrow tables in all encodings: plain, dictionary, and run-end encoded."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt


def holds_text(kind: pa.DataType) -> bool:
    """Whether values of this type are strings; where all values are missing, a column has the type null."""
    if isinstance(kind, pa.BaseExtensionType):
        return holds_text(kind.storage_type)
    if pt.is_dictionary(kind) or pt.is_run_end_encoded(kind):
        return holds_text(kind.value_type)
    return any(is_it(kind) for is_it in (pt.is_string, pt.is_large_string, pt.is_string_view, pt.is_null))


def plain(column: pa.Array) -> pa.Array:
    """The same values, each spelt out."""
    if isinstance(column, pa.ExtensionArray):
        return plain(column.storage)
    if isinstance(column, pa.DictionaryArray):
        return measurable(column.dictionary).take(column.indices)
    if isinstance(column, pa.RunEndEncodedArray):
        return plain(pc.run_end_decode(column))
    return column


def measurable(column: pa.Array) -> pa.Array:
    """`plain`, in a type of which Arrow can take and measure single values."""
    column = plain(column)
    return column if pt.is_string(column.type) or pt.is_large_string(column.type) else column.cast(pa.large_string())


def plain_size(column: pa.Array) -> int:
    """About how many bytes `plain` takes."""
    if isinstance(column, pa.ExtensionArray):
        return plain_size(column.storage)
    if isinstance(column, pa.DictionaryArray) and len(column.dictionary):
        lengths = pc.binary_length(measurable(column.dictionary))
        return pc.sum(lengths.take(column.indices)).as_py() or 0
    if isinstance(column, pa.RunEndEncodedArray):
        return plain_size(pc.run_end_decode(column))
    return int(column.nbytes)
