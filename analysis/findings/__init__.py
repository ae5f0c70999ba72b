"""What a database says about declared takeaways: `takeaways` reads them, `contrasts` finds the cells that they compare,
`verdicts` tests, `page` writes it down."""
