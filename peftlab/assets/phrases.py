"""The phrases of the support desk, written for this project, in three sets that have no sentence in common.

`{p}` is the product that the message is about, `{o}` another one, `{n}` a number. A sentence under a label's name
decides that label; the other sentences decide nothing. No sentence of validation or test occurs in training. But the
same words occur in all three: the names of products, and the words that reveal a label (refund, invoice, urgent, can
wait). So a score says only that the model understands known words in new sentences.
"""

from collections.abc import Sequence

Phrases = dict[str, dict[str, Sequence[str]]]  # by label, then by split

PRODUCTS = ("kettle", "lamp", "printer", "router", "camera", "blender", "heater", "keyboard")

INTENTS = {
    "refund": {
        "train": (
            "I would like my money back for the {p}.",
            "Please refund what I paid for the {p}.",
            "I am sending the {p} back and want the full price returned.",
            "Could you transfer the money for the {p} to my card?",
            "The {p} is not what I expected, so please pay me back.",
            "I want to give back the {p} and be reimbursed.",
            "Kindly issue a refund for the {p}.",
            "I no longer want the {p}; please reimburse me.",
            "How do I get my money back for the {p}?",
            "Please take the {p} back and return my payment.",
            "I have changed my mind about the {p} and ask for a refund.",
            "May I return the {p} for the price I paid?",
            "I would rather have my money than the {p}.",
            "The {p} does not suit me, so I wish to be refunded.",
            "I ask you to pay back the price of the {p}.",
            "Please send my money for the {p} back to my account.",
            "I am returning the {p} and expect my payment back.",
            "I do not want a new {p}, I want my money.",
            "Is it possible to get a refund for the {p}?",
            "You may have the {p} back if I get my money.",
            "I claim the return of the price of the {p}.",
            "The {p} is too big for us, we would like a refund.",
            "Let me have the money for the {p} back, please.",
            "I would like to cancel the purchase of the {p} and be repaid.",
        ),
        "validation": (
            "I should like to be paid back for the {p}.",
            "Can I hand the {p} back and have my money returned?",
            "A refund for the {p} would be the right thing.",
            "Please reimburse the cost of the {p}.",
            "I am giving the {p} back and ask for my payment.",
        ),
        "test": (
            "I want a full refund on the {p}.",
            "Please give me back the money I spent on the {p}.",
            "I have decided against the {p} and would like to be reimbursed.",
            "The {p} is going back to you, so please return what I paid.",
            "Would you refund me for the {p}?",
            "I do not wish to keep the {p}; I want my money back.",
            "Please reimburse me for the {p}.",
            "Can I get my money for the {p} back?",
            "I would like you to pay back what the {p} cost.",
            "Please cancel the sale of the {p} and refund my card.",
        ),
    },
    "repair": {
        "train": (
            "The {p} no longer switches on.",
            "The {p} stopped working after two days.",
            "The {p} makes a loud grinding noise and then goes dead.",
            "My {p} is broken and needs mending.",
            "Can somebody fix the {p}?",
            "A part inside the {p} has come loose.",
            "The {p} keeps turning itself off.",
            "The {p} has a fault, please have it repaired.",
            "Something in the {p} is cracked.",
            "The switch of the {p} does nothing any more.",
            "The {p} smells of burnt plastic and will not run.",
            "The {p} gave up this week and shows no sign of life.",
            "Could a technician look at the {p}, which is defective?",
            "The {p} fails every time I try to start it.",
            "My {p} has broken down.",
            "The {p} worked for a month and now does nothing.",
            "Please mend the {p} for me.",
            "The {p} is damaged and does not run properly.",
            "I think the motor of the {p} has failed.",
            "The {p} will not start, whatever I do.",
            "There is a defect in the {p}.",
            "Since this morning the {p} is dead.",
            "The {p} stops after a few seconds each time.",
            "I would like to have the {p} fixed.",
        ),
        "validation": (
            "The {p} has stopped running.",
            "The {p} is faulty and should be mended.",
            "I cannot get the {p} to start at all.",
            "The {p} broke; can you fix it?",
            "The {p} is not working.",
        ),
        "test": (
            "The {p} does not work any longer.",
            "The {p} is defective and I would like it fixed.",
            "My {p} broke down and will not turn on.",
            "The {p} shuts off by itself after a minute.",
            "Please repair the {p}, its switch is broken.",
            "There is something wrong inside the {p}, it rattles and stops.",
            "The {p} suddenly stopped working.",
            "The {p} has a defect and needs to be mended.",
            "My {p} is broken: nothing happens when I switch it on.",
            "Could you have a look at my {p}, it is broken?",
        ),
    },
    "delivery": {
        "train": (
            "The {p} has not arrived yet.",
            "Where is the {p} that I ordered?",
            "I am still waiting for the {p} to be delivered.",
            "The tracking page of the {p} has not moved for days.",
            "The parcel with the {p} seems to be lost.",
            "When will the {p} reach me?",
            "The courier never brought the {p}.",
            "The {p} should have been here by now.",
            "The box came without the {p} in it.",
            "The shipment of the {p} is late.",
            "Nobody can tell me where the parcel with the {p} is.",
            "The {p} was left at a wrong address.",
            "The {p} was marked as delivered, but I have nothing.",
            "Has the {p} been sent at all?",
            "My order of the {p} has not been delivered.",
            "I have not received the {p}.",
            "The {p} is overdue, where is it?",
            "I waited at home, but nobody brought the {p}.",
            "The parcel for me with the {p} is missing.",
            "Can you find the lost parcel with the {p}?",
            "How much longer until the {p} comes?",
            "The {p} did not come on the promised day.",
            "Please check where the package with the {p} is now.",
            "The post says it knows nothing of the {p}.",
        ),
        "validation": (
            "The {p} still has not been delivered.",
            "The parcel with my {p} never came.",
            "Can you find out where the {p} is on its way?",
            "I have been expecting the {p} and it is late.",
            "I have yet to receive the {p}.",
        ),
        "test": (
            "My {p} has still not arrived.",
            "Can you tell me where the parcel with my {p} is?",
            "The courier has lost the parcel that held the {p}.",
            "The {p} never reached my address.",
            "On which day will the {p} be delivered?",
            "The delivery of the {p} is overdue.",
            "I have not got the {p} that I ordered.",
            "Where has the parcel with the {p} gone?",
            "I am waiting for the {p} that I ordered.",
            "The {p} did not arrive on the day you promised.",
        ),
    },
    "billing": {
        "train": (
            "I was charged twice for the {p}.",
            "The invoice for the {p} shows the wrong amount.",
            "The bill for the {p} has a mistake in it.",
            "My card was charged more for the {p} than your page said.",
            "The discount is missing from the invoice for the {p}.",
            "Please send a corrected invoice for the {p}.",
            "There are two payments for one {p} on my statement.",
            "The tax on the bill for the {p} is wrong.",
            "The sum you took for the {p} does not match the order.",
            "My voucher was not counted on the bill for the {p}.",
            "The invoice for the {p} names another company.",
            "I never got an invoice for the {p}.",
            "My bank shows a second charge for the {p}.",
            "The price on the receipt of the {p} is too high.",
            "You billed me for two of the {p}, but I ordered one.",
            "The bill for the {p} is wrong.",
            "I paid for the {p} once, but was charged again.",
            "The invoice for the {p} has a wrong address on it.",
            "Please check the charge for the {p} on my card.",
            "I was billed for a {p} that I did not order.",
            "The total on the invoice for the {p} is not right.",
            "Why is the bill for the {p} higher than the price?",
            "Please send me the invoice for the {p}.",
            "The payment for the {p} was taken two times.",
        ),
        "validation": (
            "The bill for the {p} is not correct.",
            "You have charged me two times for the {p}.",
            "The invoice of the {p} lists a wrong price.",
            "The amount charged for the {p} is more than agreed.",
            "There is a mistake in the invoice for the {p}.",
        ),
        "test": (
            "The invoice for the {p} has an error in it.",
            "The {p} was billed twice.",
            "You charged my card too much for the {p}.",
            "The amount on the bill for the {p} is not the one agreed.",
            "My account shows a double payment for the {p}.",
            "I need the invoice for the {p} corrected.",
            "The invoice for the {p} is wrong.",
            "I have been charged two times for the {p}.",
            "Why does the bill for the {p} show a higher price?",
            "Please correct the bill for the {p}.",
        ),
    },
    "advice": {
        "train": (
            "How do I clean the {p}?",
            "Which setting of the {p} do you recommend?",
            "What does the small light on the {p} mean?",
            "Can you explain how to set up the {p}?",
            "Is the {p} meant to be used outdoors?",
            "Where can I read how to use the {p}?",
            "How long should the {p} be left on?",
            "Which spare parts fit the {p}?",
            "May I put the {p} next to a window?",
            "What is the best way to store the {p}?",
            "I do not understand the buttons of the {p}.",
            "Does the {p} need a special plug?",
            "Please tell me how to change the language of the {p}.",
            "Is there a manual for the {p} in French?",
            "Could you tell me how the {p} works?",
            "How often does the {p} have to be cleaned?",
            "What is the button on the side of the {p} for?",
            "Can I use the {p} in the bathroom?",
            "How do I reset the {p}?",
            "Which cable goes with the {p}?",
            "I would like to know how to use the {p} properly.",
            "What do I have to do before I use the {p} for the first time?",
            "Can the {p} be connected to my phone?",
            "Do you have tips on how to look after the {p}?",
        ),
        "validation": (
            "How should I look after the {p}?",
            "Could you explain the settings of the {p}?",
            "What is the second button of the {p} for?",
            "Can the {p} be used in a damp room?",
            "How do I use the {p}?",
        ),
        "test": (
            "How is the {p} set up for the first time?",
            "What does the little sign on the {p} mean?",
            "Can you tell me how to clean the {p} safely?",
            "Which button of the {p} should I use?",
            "Is it all right to use the {p} in the garden?",
            "I have a question about how to use the {p}.",
            "How do I best clean the {p}?",
            "What is the small button on the {p} for?",
            "Can you explain how long the {p} may stay on?",
            "Please explain to me how the {p} is used.",
        ),
    },
}

# high: needed today or tomorrow, or work stands still. low: it can wait. normal: about a week, or nothing is said.


def _each(frames: tuple[str, ...], words: tuple[str, ...]) -> tuple[str, ...]:
    """Every frame with every word in place of its `{w}`."""
    return tuple(frame.replace("{w}", word) for frame in frames for word in words)


# How soon, in the label's own words.
STATED: Phrases = {
    "urgent": {
        "train": (
            "This is urgent.",
            "It is very urgent.",
            "My case is urgent.",
            "Please note that it is urgent.",
            "I write in an urgent matter.",
            "Please treat it as urgent.",
            "For us it is urgent.",
            "It is really urgent.",
            "Please be quick, it is urgent.",
            "I am afraid it is rather urgent.",
        ),
        "validation": ("The whole thing is urgent.", "I mark this as urgent."),
        "test": (
            "My message is urgent.",
            "You should know that this is urgent.",
            "It has become urgent for me.",
            "I would call it urgent.",
        ),
    },
    "normal": {"train": ("",), "validation": ("",), "test": ("",)},
    "can wait": {
        "train": (
            "This can wait.",
            "It can wait.",
            "My case can wait.",
            "Please note that it can wait.",
            "It can wait for months.",
            "For us it can wait.",
            "I am sure that it can wait.",
            "It can really wait.",
            "Do not hurry, it can wait.",
            "I believe it can wait a little.",
        ),
        "validation": ("The whole thing can wait.", "I mark this as one that can wait."),
        "test": (
            "My message can wait.",
            "You should know that this can wait.",
            "The matter can wait a while.",
            "I would say it can wait.",
        ),
    },
}

# How soon, in other words (`{w}`): they stand in all three splits, each time in other sentences.
_SOON = ("today", "at once", "immediately", "right away")
_URGENT = ("urgent", "very urgent", "really urgent")
_HURRY = ("hurry", "rush")
_WAIT = ("can wait", "can wait a while", "can wait for months")

URGENCY: Phrases = {
    "urgent": {
        "train": (
            *_each(("I need an answer {w}.", "Please act {w}.", "This has to be settled {w}."), _SOON),
            *_each(("I must have a solution {w}.", "Please look into it {w}."), _SOON),
            *_each(("This is {w}.", "It is {w}.", "My case is {w}.", "Please note that it is {w}."), _URGENT),
        ),
        "validation": (*_each(("I ask you to reply {w}.",), _SOON), *_each(("The whole thing is {w}.",), _URGENT)),
        "test": (
            *_each(("Please deal with this {w}.", "I need it sorted out {w}."), _SOON),
            *_each(("My message is {w}.", "You should know that this is {w}."), _URGENT),
        ),
    },
    "normal": {"train": ("",), "validation": ("",), "test": ("",)},
    "can wait": {
        "train": (
            *_each(
                ("There is no {w}.", "There is no {w} at all.", "I am in no {w}.", "There is really no {w}."), _HURRY
            ),
            *_each(("I am in no great {w}.",), _HURRY),
            *_each(("This {w}.", "It {w}.", "My case {w}.", "Please note that it {w}."), _WAIT),
        ),
        "validation": (*_each(("There is certainly no {w}.",), _HURRY), *_each(("The whole thing {w}.",), _WAIT)),
        "test": (
            *_each(("I am really in no {w}.", "There is no {w} with this.", "We are in no {w}."), _HURRY),
            *_each(("My message {w}.", "You should know that this {w}."), _WAIT),
        ),
    },
}

# Another product, which needs nothing.
_GOOD = ("fine", "perfect", "excellent", "very good")
OTHERS = {
    "train": (
        *_each(("The {o} from the same order is {w}.", "I also bought the {o}, which is {w}."), _GOOD),
        *_each(("The {o} I bought last year is {w}.", "We all find the {o} {w}.", "My {o} is {w}."), _GOOD),
        *_each(("By the way, the {o} is {w}.", "With the {o} all is {w}.", "My sister's {o} is {w}."), _GOOD),
        *_each(("The {o} that came with it is {w}.", "I think that the {o} is {w}.", "Your {o} is {w}."), _GOOD),
        *_each(
            (
                "The {o} in the other box is {w}.",
                "I must admit that the {o} is {w}.",
                "The {o} that I have had since spring is {w}.",
                "I can say that the {o} is {w}.",
            ),
            _GOOD,
        ),
    ),
    "validation": _each(("Everything about the {o} is {w}.", "Your {o} is {w}, I must say."), _GOOD),
    "test": _each(
        ("I also own the {o}, which is {w}.", "By the way, your {o} is {w}.", "My brother's {o} is {w}."),
        _GOOD,
    ),
}

# Words that belong to another intent, said in passing.
PASSING = {
    "train": (
        "Your prices are fair.",
        "The courier was friendly.",
        "The manual is well written.",
        "I paid by card.",
        "I kept the box and the receipt.",
        "I read the questions on your page first.",
        "An earlier order came on time.",
        "My old one was repaired years ago.",
    ),
    "validation": ("Your couriers are polite.", "I have the receipt here.", "I have looked into the manual."),
    "test": (
        "Your last delivery was quick.",
        "I still have the receipt.",
        "The instructions are pleasant to read.",
        "The price was good.",
        "I paid on the spot.",
    ),
}

# Feelings: an angry customer may have time, and a cheerful one none.
FEELINGS = {
    "train": (
        "I am very disappointed.",
        "I am quite angry, to be honest.",
        "I love your shop.",
        "This makes me sad.",
        "I am a great fan of yours.",
        "What a nuisance.",
        "I am not cross with you.",
        "Honestly, I am annoyed.",
    ),
    "validation": ("I feel let down.", "You are my favourite shop.", "I am a little upset."),
    "test": (
        "I am rather unhappy.",
        "I am furious about this.",
        "I always enjoy shopping with you.",
        "I do not mind much.",
        "It is a great pity.",
    ),
}

# Times that say nothing about when an answer is needed.
TIMES = {
    "train": (
        "I bought it last Tuesday.",
        "I have been a customer for {n} years.",
        "We moved house in the spring.",
        "I ordered it {n} days ago.",
        "I wrote to you once before, in May.",
        "It was a birthday present in June.",
    ),
    "validation": ("I ordered on a Monday.", "I have known you for {n} years.", "It was bought in the autumn."),
    "test": (
        "The order was placed on the {n}th.",
        "I have shopped here for {n} years.",
        "It was a gift for my mother in March.",
        "I first saw it in your shop on a Saturday.",
    ),
}

# Most people come to the point.
_NONE = ("",) * 6
OPENINGS = {
    "train": ("Hello.", "Good morning.", "Dear team.", "Hi there.", "Good afternoon.", "To the support team.", *_NONE),
    "validation": ("Good day.", "Dear support.", *_NONE[:2]),
    "test": ("Greetings.", "Dear all.", "Good evening.", *_NONE[:3]),
}
CLOSINGS = {
    "train": ("Thank you.", "Many thanks.", "Kind regards, Anna", "Best wishes, Tom", "Cheers, Leo", *_NONE),
    "validation": ("Thanks a lot.", "With regards, Eve", *_NONE[:2]),
    "test": ("Thanks in advance.", "Warm regards, Sam", "Sincerely, Mr Ford", *_NONE[:3]),
}

# Hard ways to say it, used from the middle of the dial upwards: the product is described, not named ...
DESCRIBED = {
    "kettle": {
        "train": ("thing that boils my water", "pot for boiling water"),
        "validation": ("jug that heats water",),
        "test": ("device I boil water for tea in", "water boiler"),
    },
    "lamp": {
        "train": ("light for my desk", "thing that lights the room"),
        "validation": ("light by the bed",),
        "test": ("reading light", "light in the corner"),
    },
    "printer": {
        "train": ("machine that prints my letters", "device that puts ink on paper"),
        "validation": ("machine for printing",),
        "test": ("thing I print my pages with", "ink and paper machine"),
    },
    "router": {
        "train": ("box that brings the internet", "device for the wireless network"),
        "validation": ("internet box",),
        "test": ("box that gives us the wireless internet", "network device"),
    },
    "camera": {
        "train": ("thing I take photographs with", "device for taking pictures"),
        "validation": ("picture taker",),
        "test": ("device I photograph birds with", "thing for taking photos"),
    },
    "blender": {
        "train": ("machine that mixes my fruit", "mixer for smoothies"),
        "validation": ("mixer in the kitchen",),
        "test": ("thing I mix fruit drinks in", "smoothie maker"),
    },
    "heater": {
        "train": ("thing that warms the room", "device that keeps the office warm"),
        "validation": ("warm air machine",),
        "test": ("device that warms my bedroom", "thing that heats the room"),
    },
    "keyboard": {
        "train": ("thing I type on", "board with the keys"),
        "validation": ("typing board",),
        "test": ("device I type my letters on", "set of keys for my computer"),
    },
}

# ... and the urgency has to be inferred.
IMPLIED: Phrases = {
    "urgent": {
        "train": (
            "My guests arrive this evening and I depend on it.",
            "Twenty people are waiting in front of my counter.",
            "My exam is tomorrow and I cannot do it without.",
            "Our market stall opens in three hours.",
        ),
        "validation": ("I leave for the airport tonight and need it with me.",),
        "test": ("The wedding is tomorrow and all depends on it.", "Customers are queueing in my shop as I write."),
    },
    "normal": {"train": ("",), "validation": ("",), "test": ("",)},
    "can wait": {
        "train": (
            "I shall only use it next winter.",
            "I am travelling for half a year anyway.",
            "It is for a house that is not built yet.",
            "I have three more of them.",
        ),
        "validation": ("I will not be at home before next year.",),
        "test": ("I shall be away for many months.", "It is a present for next Christmas."),
    },
}
