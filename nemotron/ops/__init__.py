"""Operations: one function each, with a readable reference and faster rivals."""
