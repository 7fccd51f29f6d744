"""The experiment store on SQLAlchemy."""
