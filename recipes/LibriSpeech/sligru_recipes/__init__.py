"""What the commands of this recipe folder share; they import it from beside them."""
