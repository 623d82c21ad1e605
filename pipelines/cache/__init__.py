"""The teacher's outputs, computed once and kept as Parquet: what is kept, where, written, read.

``columns`` is what one column holds, ``storage`` a folder on any file system, ``manifest`` what a
cache is of and what of it is there, ``write`` fills it by Ray Data, ``read`` makes rows of it,
``inspection`` says what is in it, whether it is still right, and what of it is rubbish.
"""
