"""Operations between matrix products, in several implementations with identical results."""
