"""The files that are an adapter: opened, checked and read, whoever wrote them."""
