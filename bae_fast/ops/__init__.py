"""Raw operators: their schemas and fakes (`schemas`), and the choice of a backend (`registry`)."""
