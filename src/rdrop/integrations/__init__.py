"""One thin module per framework people already train with. `import rdrop` loads none of them."""
