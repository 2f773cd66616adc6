"""Lists the people of a store, adds people, makes new links, or ends the access of somebody.

hf-rlhf collect links --store judgments.sqlite --add jonas --url http://127.0.0.1:8347
"""

from dataclasses import dataclass, field

from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.collect_parts.options import PORT, STORE_HELP, existing_store, public_address, split_names_of
from hf_rlhf_ext.recipes.collect_parts.people import print_links

CHANGES = ("add", "add_admin", "new", "deactivate", "activate")
"""Options that name the people for whom something changes."""


@dataclass
class LinksArguments:
    """What to do with whom. Without any of these options, the people are listed."""

    store: str | None = field(default=None, metadata={"help": STORE_HELP + " A server may use it meanwhile."})
    add: list[str] | None = field(default=None, metadata={"help": "People to add, as `anna tom` or `anna,tom`."})
    add_admin: list[str] | None = field(default=None, metadata={"help": "Administrators to add."})
    new: list[str] | None = field(
        default=None, metadata={"help": "People who get a new link. The old one stops working."}
    )
    deactivate: list[str] | None = field(
        default=None, metadata={"help": "People whose link stops working. Their judgments are kept."}
    )
    activate: list[str] | None = field(
        default=None, metadata={"help": "People who may judge again, with their last link."}
    )
    url: str = field(default=f"http://127.0.0.1:{PORT}", metadata={"help": "Address of the server, for the links."})

    def __post_init__(self):
        self.url = public_address(self.url)
        split_names_of(self, *CHANGES)
        refuse_two_changes(self)


ARGUMENTS = (LinksArguments,)


def run(args: LinksArguments) -> None:
    with existing_store(args.store) as store:
        # All names are looked at before anything is changed.
        for option in ("add", "add_admin"):
            refuse_known(store, getattr(args, option), option)
        for option in ("new", "deactivate", "activate"):
            refuse_unknown(store, getattr(args, option), option)
        tokens = {}
        for name in args.add:
            tokens[name] = store.add_annotator(name)
        for name in args.add_admin:
            tokens[name] = store.add_annotator(name, role="admin")
        for name in args.new:
            tokens[name] = store.new_token(name)
        for name in args.deactivate:
            store.set_active(name, False)
            print(f"{name} cannot judge any more; the judgments are kept")
        for name in args.activate:
            store.set_active(name, True)
            print(f"{name} can judge again")
        print_links(tokens, args.url)
        if not any(getattr(args, option) for option in CHANGES):
            list_people(store)


def refuse_two_changes(args: LinksArguments) -> None:
    """Raises `UserError` for a person whom two options name, as their order would decide what happens."""
    option_of: dict[str, str] = {}
    for option in CHANGES:
        for name in getattr(args, option):
            if name in option_of:
                raise UserError(f"{option}: {name!r} is also in --{option_of[name]}: use one of them at a time.")
            option_of[name] = option


def refuse_known(store: Store, names: list[str], option: str) -> None:
    there = {person.name for person in store.annotators()}
    for name in names:
        if name in there:
            raise UserError(f"{option}: {name!r} is in the store already: --new {name} makes a new link.")


def refuse_unknown(store: Store, names: list[str], option: str) -> None:
    there = [person.name for person in store.annotators()]
    for name in names:
        if name not in there:
            raise UserError(f"{option}: nobody is called {name!r}: the store has {', '.join(there) or 'nobody'}.")


def list_people(store: Store) -> None:
    """Prints one line per person. Links are not printed: only their hashes are stored."""
    people = store.annotators()
    if not people:
        print("Nobody yet: --add anna,tom adds people.")
        return
    width = max(len(person.name) for person in people)
    for person in people:
        state = "active" if person.active else "deactivated"
        done = f"{person.judged} judged, {person.skipped} skipped"
        print(f"{person.name:<{width}}  {person.role:<9}  {state:<11}  {done}")
