"""Operations: one callable each, with a readable reference and faster backends."""
