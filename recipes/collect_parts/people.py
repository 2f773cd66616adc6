"""The people of a store and their secret links, as the subcommands print them."""

from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.errors import UserError

ADMIN = "admin"
"""Name of the administrator, who is made with the store."""


def add_people(store: Store, names: list[str]) -> dict[str, str]:
    """Adds the people who are not in the store yet, and an administrator if there is none.

    Returns:
        The secret token of each new person, by name. Only its hash is stored, so it cannot be read again.

    Raises:
        UserError: a person would have the name of the administrator.
    """
    known = store.annotators()
    known_names = {person.name for person in known}
    if ADMIN in names and ADMIN not in known_names:
        raise UserError(f"people: {ADMIN!r} is the administrator, who gets a link too: give the person another name.")
    tokens = {}
    for name in names:
        if name not in known_names:
            tokens[name] = store.add_annotator(name)
    if not any(person.role == "admin" for person in known):
        tokens[ADMIN] = store.add_annotator(ADMIN, role="admin")
    return tokens


def new_links(store: Store) -> dict[str, str]:
    """New secret tokens of all active people, by name. Their old links stop working."""
    return {person.name: store.new_token(person.name) for person in store.annotators() if person.active}


def print_links(tokens: dict[str, str], base: str) -> None:
    """Prints the secret links of people.

    Args:
        tokens: secret token by name.
        base: address of the server, without a slash at the end.
    """
    if not tokens:
        return
    print("Personal links. Each one is a password: give it to one person only. They are not shown again.")
    width = max(len(name) for name in tokens)
    for name, token in tokens.items():
        print(f"  {name:<{width}}  {base}/join/{token}", flush=True)
