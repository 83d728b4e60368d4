"""The same backbone as other libraries take it: their calls, their attributes, their names of parameters."""
