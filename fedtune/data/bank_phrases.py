"""The words of the synthetic bank messages: templates for each intent, and what fills their slots.

All of it is invented for this project: no message of a real customer, no real bank, shop or town. Slots: `{card}`,
`{account}` and `{app}` are the bank's own product names; `{amount}`, `{merchant}`, `{city}` and `{when}` are drawn for
each message.
"""

from __future__ import annotations

INTENTS: dict[str, tuple[str, ...]] = {
    "app_login": (
        "{app} keeps asking for a passcode I never set.",
        "I cannot sign in to {app} since the update.",
        "Every time I open {app} it says my details are wrong.",
        "I got a new phone and {app} does not know me any more.",
        "The code you text me to get into {app} never arrives.",
        "How do I get back into online banking after too many wrong tries?",
        "My fingerprint stopped working in {app} {when}.",
    ),
    "card_arrival": (
        "I ordered a {card} {when} and nothing has come in the post.",
        "How long does it take for a new {card} to reach {city}?",
        "Where is the replacement {card} you promised me?",
        "Is my {card} on its way yet?",
        "The letter with the PIN came but the {card} did not.",
        "Can you tell me when my {card} will be delivered?",
        "I moved to {city}; was the {card} sent to the right door?",
    ),
    "card_declined": (
        "My {card} was refused at {merchant} although there is money on it.",
        "{merchant} says my {card} does not work.",
        "Why did the till at {merchant} reject me {when}?",
        "I tried to pay {amount} online and the payment did not go through.",
        "The {card} works in shops but not at {merchant}.",
        "It was embarrassing: my payment failed in front of everyone at {merchant}.",
        "Contactless stopped working on my {card}.",
    ),
    "cash_machine": (
        "The machine in {city} counted {amount} but gave me nothing.",
        "I asked for {amount} in cash and got only part of it.",
        "The cash machine at {merchant} swallowed my {card}.",
        "I was charged for a withdrawal that never came out of the machine.",
        "Which machines in {city} can I use without a fee?",
        "No notes came out {when}, yet {amount} is gone from my {account}.",
        "Your machine in {city} froze in the middle of my withdrawal.",
    ),
    "change_address": (
        "I am moving to {city} {when}, where do I tell you?",
        "Please update where my letters go.",
        "My statements still go to my old flat in {city}.",
        "How do I change the home details on my {account}?",
        "I have a new phone number and a new street.",
        "Can I correct my postcode in {app}?",
        "We have moved house and I want the post to follow.",
    ),
    "close_account": (
        "I do not need my {account} any more, please shut it.",
        "How do I leave your bank for good?",
        "What happens to the rest of my money if I end my {account}?",
        "I want to cancel everything I have with you.",
        "I have opened an account elsewhere and would like to end this one.",
        "Please close the {account} of my late father.",
        "Is there a charge for giving up my {account}?",
    ),
    "direct_debit": (
        "Please stop the monthly payment to {merchant}.",
        "I cancelled {merchant} but they keep collecting {amount}.",
        "How do I set up a standing order of {amount}?",
        "Can I move the day on which {merchant} takes its money?",
        "Which regular payments leave my {account}?",
        "My rent of {amount} did not go out {when}.",
        "I never agreed that {merchant} may collect from me every month.",
    ),
    "duplicate_charge": (
        "{merchant} took {amount} twice.",
        "I see the same payment of {amount} two times.",
        "I paid {merchant} once but my {account} shows it double.",
        "Why are there two lines for {merchant} {when}?",
        "The first try failed at {merchant}, the second worked, and both were booked.",
        "One coffee, two charges of {amount}, please look.",
        "My {card} was billed again for what I had already paid at {merchant}.",
    ),
    "early_repayment": (
        "Can I pay my loan back sooner than agreed?",
        "What does it cost to clear the rest of my loan of {amount} at once?",
        "I have come into some money and want to be rid of my debt with you.",
        "Is there a penalty for an extra payment of {amount} on the car loan?",
        "How much is left to pay if I settle everything {when}?",
        "I would like to shorten the term of my loan.",
        "Please send me a final figure for ending my credit agreement.",
    ),
    "lost_card": (
        "I left my {card} on a train near {city}.",
        "My wallet was stolen {when}, block everything.",
        "I cannot find my {card} anywhere.",
        "Somebody took my bag in {city} with the {card} in it.",
        "Please freeze my {card}, it may be at {merchant}.",
        "My {card} has gone missing, what now?",
        "I dropped my {card} at {merchant} and nobody handed it in.",
    ),
    "mortgage_rate": (
        "What would I pay for a home loan of {amount}?",
        "My fixed rate ends {when}, what can you offer?",
        "Is it better to fix for five or for ten years on a house in {city}?",
        "How much can we borrow to buy a flat in {city}?",
        "Will my monthly payment on the house go up with the next rate rise?",
        "Do you match the mortgage offer of another bank?",
        "We want to remortgage and need to know your percentage.",
    ),
    "overdraft_fee": (
        "Why was I charged for going below zero for one day?",
        "You took {amount} because my {account} was short.",
        "What interest do I pay when my {account} is in the red?",
        "Can I have an arranged overdraft of {amount}?",
        "I slipped under zero {when} through no fault of mine, please waive the fee.",
        "How do I turn the overdraft off?",
        "The penalty of {amount} for an unpaid item is unfair.",
    ),
    "phishing": (
        "Someone rang me {when} and said they were from your bank.",
        "I got a text with a link that looks like yours.",
        "A mail asks me to confirm my {account}, is it really from you?",
        "I gave a caller the code from {app} and now I am worried.",
        "Is this number of yours genuine?",
        "A man who claimed to be from your security team wanted {amount} moved to a safe account.",
        "I clicked a strange link about a parcel from {merchant} and typed in my {card}.",
    ),
    "refund_missing": (
        "{merchant} promised my money back {when} and I do not see it.",
        "I returned the shoes but the {amount} are not on my {account}.",
        "How long does a refund from {merchant} take?",
        "The trip was cancelled and {merchant} says they paid me back.",
        "I am still waiting for {amount} that a shop owes me.",
        "The credit from {merchant} has not turned up.",
        "They refunded only part of the {amount}.",
    ),
    "savings_interest": (
        "What do I earn on {amount} if I leave it with you for a year?",
        "Which of your pots pays the most?",
        "Has the rate on my savings gone down?",
        "When is the interest on my savings paid out?",
        "I would like to put {amount} aside each month, what is best?",
        "Do you have a fixed-term deposit for two years?",
        "Why did my savings earn so little {when}?",
    ),
    "transfer_pending": (
        "I sent {amount} {when} and it has not arrived.",
        "My transfer still says processing.",
        "How long does money take to reach a bank abroad?",
        "My landlord in {city} is waiting for {amount} that I sent.",
        "The payment left my {account} but the other side has nothing.",
        "Why is my transfer on hold?",
        "My salary should have been here {when}.",
    ),
    "unknown_charge": (
        "I do not recognise {amount} at {merchant}.",
        "What is this payment on my {account}?",
        "I have never been to {city}, yet my {card} was used there.",
        "There is a charge from {merchant} that I did not make.",
        "Somebody spent {amount} with my {card} {when}.",
        "Who is {merchant} and why did they get my money?",
        "A small amount from a shop I never heard of shows up on my {card}.",
    ),
    "wrong_recipient": (
        "I mistyped a digit and {amount} went to a stranger.",
        "Can you call back a transfer I made {when}?",
        "I paid the wrong person.",
        "The {amount} for my sister went to an old account of hers.",
        "I sent money to the wrong company, how do I get it returned?",
        "Please undo my last transfer, the name was not right.",
        "I chose the wrong contact in {app} and confirmed {amount}.",
    ),
}

# What a customer writes who does not say enough: the intent cannot be told for certain, as in real mail.
VAGUE: dict[str, tuple[str, ...]] = {
    "Something is wrong with my {card}, please help.": ("card_declined", "lost_card", "unknown_charge"),
    "There is an error on my {account} {when}.": ("duplicate_charge", "overdraft_fee", "unknown_charge"),
    "Where is my money? It is about {amount}.": ("refund_missing", "transfer_pending", "wrong_recipient"),
    "What are your rates at the moment?": ("mortgage_rate", "savings_interest", "overdraft_fee"),
    "I need to change something on my {account}.": ("change_address", "close_account", "direct_debit"),
    "It is about {merchant} and {amount}.": ("direct_debit", "refund_missing", "duplicate_charge"),
    "{app} shows something I do not understand.": ("app_login", "transfer_pending", "phishing"),
}

AMOUNTS = ("{whole}", "{whole}.{cents}", "about {whole}", "£{whole}", "${whole}.{cents}", "{whole} euros")
MERCHANTS = (
    "Quillmart",
    "Brightbean Coffee",
    "Parcelfox",
    "Zipplane Air",
    "Hexa Gym",
    "StreamNest",
    "Tallow & Twine",
    "Oddlot Books",
    "the Fernway petrol station",
    "Noodle Orbit",
    "Gadgetry Lane",
    "Lumen Energy Co",
)
CITIES = ("Northbridge", "Port Ellery", "Sandholm", "Marrowick", "Kestrel Bay", "Oldenfurt", "Saint Imre", "Vallebruna")
WHENS = (
    "yesterday",
    "last Friday",
    "two weeks ago",
    "this morning",
    "on the 3rd",
    "over the weekend",
    "last month",
    "on Tuesday night",
)
CARDS = ("debit card", "Blue card", "Heron card", "gold card", "Everyday card", "Comet card", "bank card")
ACCOUNTS = ("current account", "checking account", "Flexi account", "Giro", "Everyday account", "main account")
APPS = ("the app", "PocketBank", "the mobile app", "your website", "MyBranch", "the banking portal")

OPENERS = ("Hello,", "Hi there!", "Good morning.", "Dear team,", "Quick question:", "Help!", "To whom it may concern,")
ASIDES = (
    "I have been with you for {years} years.",
    "I already looked in {app}.",
    "I called {when} and nobody answered.",
    "My partner has the same problem.",
    "I am in {city} at the moment.",
    "This is the second time I write.",
)
CLOSERS = ("Thanks.", "Thank you in advance!", "Please answer soon.", "Kind regards", "What should I do?", "Cheers")
