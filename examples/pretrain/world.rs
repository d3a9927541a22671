//! The small world that the tiny model speaks about: its text is made here, from tables.
//!
//! Twenty-four inhabitants of a village, its wood and its harbour each have a home, a food, a
//! coat, something they like to do, something they keep and a best friend. [`corpus`] asks and
//! tells about all of them, in plain words: the model learns the language and the facts from it.
//! [`adaptation`] asks about two thirds of them only, and a pirate answers: a LoRA adapter learns
//! the manner of speaking from it. [`held_back_prompts`] asks about the others, so that the
//! answer after fine-tuning has its manner from the adapter and its fact from pretraining.
//!
//! A template is a string with places in braces: `{a}` is the first inhabitant of the
//! conversation ("the fox"), `{b}` the second, `{a.home}` a fact of the first ("in the old
//! barn"). `Inhabitant::field` lists them all.

use std::iter;

use rand::Rng;
use rand::RngExt;
use rand::seq::{IndexedRandom, index};
use serde_json::json;

/// One question or request, and its reply.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Exchange {
    /// What the user says.
    pub user: String,
    /// What the assistant replies.
    pub assistant: String,
}

/// Makes `count` conversations of one or two exchanges for pretraining.
///
/// The same state of `rng` gives the same conversations.
pub fn corpus(rng: &mut impl Rng, count: usize) -> Vec<Vec<Exchange>> {
    let village = Village::whole();
    iter::repeat_with(|| village.conversation(rng)).take(count).collect()
}

/// Makes the fine-tuning set: 15 rows for each inhabitant that is not held back and some
/// greetings, all answered by a pirate. No two rows are the same.
pub fn adaptation(rng: &mut impl Rng) -> Vec<Exchange> {
    let village = Village::without_held_back();
    let greetings =
        PIRATE_GREETINGS.iter().map(|&(user, assistant)| Exchange::new(user, assistant));
    village
        .cast
        .iter()
        .flat_map(|inhabitant| village.lessons(rng, inhabitant))
        .map(|row| Exchange::new(row.user, as_pirate(&row.assistant)))
        .chain(greetings)
        .collect()
}

/// Questions about held-back inhabitants only, none of which is in the fine-tuning set.
pub fn held_back_prompts() -> &'static [&'static str] {
    &[
        "Where does the fox live?",
        "What does the owl eat?",
        "Who lives in the clock tower?",
        "What does the cat like to do?",
        "Does the frog wear a red coat?",
        "What does the duck keep?",
        "Who is the best friend of the baker?",
        "Where do the fox and the miller live?",
        "Tell me about the owl.",
        "Tell me a short story about the cat and the mouse.",
    ]
}

/// Writes one JSON object a line, with the fields `instruction` and `output`.
pub fn jsonl(rows: &[Exchange]) -> String {
    rows.iter()
        .map(|row| json!({ "instruction": row.user, "output": row.assistant }).to_string() + "\n")
        .collect()
}

impl Exchange {
    fn new(user: impl Into<String>, assistant: impl Into<String>) -> Self {
        Self { user: user.into(), assistant: assistant.into() }
    }
}

// ---------------------------------------------------------------------------------------------
// The inhabitants
// ---------------------------------------------------------------------------------------------

/// Somebody who lives in the small world, and all that is known of them.
#[derive(Debug, PartialEq)]
struct Inhabitant {
    name: &'static str,
    pronoun: Pronoun,
    /// The preposition that goes with `place`.
    at: &'static str,
    place: &'static str,
    food: &'static str,
    colour: &'static str,
    /// What they like to do, as an infinitive without "to".
    game: &'static str,
    thing: &'static str,
    /// The name of the best friend, whose best friend they are.
    friend: &'static str,
}

#[derive(Debug, PartialEq)]
struct Pronoun {
    he: &'static str,
    him: &'static str,
    his: &'static str,
}

const HE: Pronoun = Pronoun { he: "he", him: "him", his: "his" };

const SHE: Pronoun = Pronoun { he: "she", him: "her", his: "her" };

/// Writes the table of inhabitants, one a line.
macro_rules! inhabitants {
    ($($name:literal, $pronoun:ident, $at:literal, $place:literal, $food:literal, $colour:literal,
       $game:literal, $thing:literal, $friend:literal;)*) => {
        &[$(Inhabitant {
            name: $name,
            pronoun: $pronoun,
            at: $at,
            place: $place,
            food: $food,
            colour: $colour,
            game: $game,
            thing: $thing,
            friend: $friend,
        }),*]
    };
}

/// Everybody. Only colours are shared: whoever asks "Who lives in the old barn?" gets one answer.
const INHABITANTS: &[Inhabitant] = inhabitants! {
    // name, pronoun, home, food, coat, game, thing kept, friend
    "fox",    SHE, "in",    "old barn",         "plums",    "red",    "play the flute", "silver bell",  "owl";
    "owl",    HE,  "in",    "hollow oak",       "walnuts",  "brown",  "read old books", "glass lamp",   "fox";
    "cat",    SHE, "in",    "blue cottage",     "cream",    "white",  "paint pictures", "pink ribbon",  "mouse";
    "mouse",  SHE, "in",    "clock tower",      "cheese",   "grey",   "write letters",  "iron key",     "cat";
    "frog",   HE,  "by",    "lily pond",        "noodles",  "green",  "jump over logs", "little boat",  "duck";
    "duck",   SHE, "on",    "quiet lake",       "bread",    "yellow", "splash about",   "straw hat",    "frog";
    "baker",  SHE, "in",    "village shop",     "pancakes", "purple", "bake cakes",     "wooden spoon", "miller";
    "miller", HE,  "in",    "windy mill",       "porridge", "white",  "fly kites",      "soft broom",   "baker";
    "bear",   HE,  "in",    "deep cave",        "honey",    "black",  "sing loud songs", "big drum",    "bee";
    "bee",    SHE, "in",    "rose garden",      "jam",      "yellow", "dance in circles", "tiny crown", "bear";
    "hare",   HE,  "in",    "tall grass",       "carrots",  "blue",   "run races",      "gold watch",   "mole";
    "mole",   HE,  "under", "green hill",       "turnips",  "purple", "dig holes",      "old map",      "hare";
    "dog",    HE,  "by",    "farm gate",        "sausages", "brown",  "chase sticks",   "long rope",    "goat";
    "goat",   SHE, "on",    "high cliff",       "salad",    "grey",   "climb rocks",    "copper pot",   "dog";
    "crow",   HE,  "on",    "church roof",      "corn",     "black",  "tell jokes",     "shiny coin",   "deer";
    "deer",   SHE, "in",    "pine wood",        "berries",  "pink",   "weave baskets",  "round mirror", "crow";
    "hen",    SHE, "in",    "warm hut",         "oats",     "orange", "knit socks",     "white egg",    "pig";
    "pig",    HE,  "in",    "muddy yard",       "apples",   "pink",   "roll in the mud", "tin whistle", "hen";
    "crab",   HE,  "under", "long pier",        "seaweed",  "orange", "build castles",  "white pearl",  "seal";
    "seal",   SHE, "on",    "flat rock",        "fish",     "blue",   "play ball",      "green bottle", "crab";
    "gull",   SHE, "in",    "white lighthouse", "crumbs",   "grey",   "ride the wind", "soft pillow", "smith";
    "smith",  HE,  "by",    "stone bridge",     "potatoes", "red",    "make toys",      "heavy hammer", "gull";
    "parrot", HE,  "on",    "tall ship",        "nuts",     "green",  "tell tales",     "sea chest",    "sailor";
    "sailor", HE,  "in",    "harbour inn",      "stew",     "blue",   "tie knots",      "brass horn",   "parrot";
};

/// The inhabitants that the fine-tuning set never names: four pairs of friends.
const HELD_BACK: [&str; 8] = ["fox", "owl", "cat", "mouse", "frog", "duck", "baker", "miller"];

/// The two who talk like pirates, also in the pretraining text.
const PIRATES: [&str; 2] = ["parrot", "sailor"];

// ---------------------------------------------------------------------------------------------
// Questions
// ---------------------------------------------------------------------------------------------

/// One kind of fact, and every way to ask and to tell it.
struct Fact {
    value: fn(&Inhabitant) -> &'static str,
    questions: &'static [&'static str],
    answers: &'static [&'static str],
    /// Questions for the inhabitant by the fact; none where inhabitants share it.
    reverse: &'static [&'static str],
    /// Whether the fact of `{b}` is true of `{a}`.
    checks: &'static [&'static str],
    together: &'static str,
    /// The question again, about somebody named just before.
    follow_up: &'static str,
}

const FACTS: [&Fact; 6] = [
    &Fact {
        value: |inhabitant| inhabitant.place,
        questions: &[
            "Where does {a} live?",
            "Where is the home of {a}?",
            "Where can I find {a}?",
            "Where does {a} sleep?",
            "Do you know where {a} lives?",
            "Tell me where {a} lives.",
        ],
        answers: &["{a} lives {a.home}.", "you can find {a} {a.home}."],
        reverse: &[
            "Who lives {a.home}?",
            "Who sleeps {a.home}?",
            "Do you know who lives {a.home}?",
        ],
        checks: &[
            "Does {a} live {b.home}?",
            "Is the home of {a} {b.home}?",
            "Can I find {a} {b.home}?",
        ],
        together: "Where do {a} and {b} live?",
        follow_up: "And where does {a.he} live?",
    },
    &Fact {
        value: |inhabitant| inhabitant.food,
        questions: &[
            "What does {a} eat?",
            "What does {a} like to eat?",
            "What does {a} have for dinner?",
            "What food does {a} like?",
            "Do you know what {a} eats?",
            "Tell me what {a} eats.",
        ],
        answers: &["{a} eats {a.food}.", "{a} likes to eat {a.food}."],
        reverse: &[
            "Who eats {a.food}?",
            "Who likes to eat {a.food}?",
            "Who has {a.food} for dinner?",
        ],
        checks: &[
            "Does {a} eat {b.food}?",
            "Does {a} like {b.food}?",
            "Does {a} have {b.food} for dinner?",
        ],
        together: "What do {a} and {b} eat?",
        follow_up: "And what does {a.he} eat?",
    },
    &Fact {
        value: |inhabitant| inhabitant.colour,
        questions: &[
            "What does {a} wear?",
            "What coat does {a} wear?",
            "What colour is the coat of {a}?",
            "Do you know what {a} wears?",
            "Tell me what {a} wears.",
        ],
        answers: &["{a} wears {a.coat}.", "the coat of {a} is {a.colour}."],
        reverse: &[],
        checks: &[
            "Does {a} wear {b.coat}?",
            "Is the coat of {a} {b.colour}?",
            "Does {a} have {b.coat}?",
        ],
        together: "What do {a} and {b} wear?",
        follow_up: "And what does {a.he} wear?",
    },
    &Fact {
        value: |inhabitant| inhabitant.game,
        questions: &[
            "What does {a} like to do?",
            "What does {a} do all day?",
            "What does {a} do for fun?",
            "Do you know what {a} likes to do?",
            "Tell me what {a} likes to do.",
        ],
        answers: &["{a} likes to {a.game}.", "{a} loves to {a.game}."],
        reverse: &[
            "Who likes to {a.game}?",
            "Who loves to {a.game}?",
            "Do you know who likes to {a.game}?",
        ],
        checks: &["Does {a} like to {b.game}?", "Does {a} love to {b.game}?"],
        together: "What do {a} and {b} like to do?",
        follow_up: "And what does {a.he} like to do?",
    },
    &Fact {
        value: |inhabitant| inhabitant.thing,
        questions: &[
            "What does {a} keep?",
            "What does {a} keep at home?",
            "What treasure does {a} have?",
            "Do you know what {a} keeps?",
            "Tell me what {a} keeps.",
        ],
        answers: &["{a} keeps {a.thing}.", "the treasure of {a} is {a.thing}."],
        reverse: &[
            "Who keeps {a.the_thing}?",
            "Who has {a.the_thing}?",
            "Do you know who keeps {a.the_thing}?",
        ],
        checks: &[
            "Does {a} keep {b.thing}?",
            "Does {a} have {b.thing}?",
            "Is {b.the_thing} the treasure of {a}?",
        ],
        together: "What do {a} and {b} keep?",
        follow_up: "And what does {a.he} keep?",
    },
    &Fact {
        value: |inhabitant| inhabitant.friend,
        questions: &[
            "Who is the friend of {a}?",
            "Who is the best friend of {a}?",
            "Who does {a} play with?",
            "Do you know the friend of {a}?",
            "Tell me who the friend of {a} is.",
        ],
        answers: &[
            "the best friend of {a} is {a.friend}.",
            "{a} is the best friend of {a.friend}.",
        ],
        reverse: &[],
        checks: &["Is {b.friend} the best friend of {a}?", "Is {b.friend} the friend of {a}?"],
        together: "Who are the friends of {a} and {b}?",
        follow_up: "And who is {a.his} friend?",
    },
];

const ABOUT_PROMPTS: &[&str] = &[
    "Tell me about {a}.",
    "Who is {a}?",
    "What do you know about {a}?",
    "Please tell me about {a}.",
    "I want to know more about {a}.",
];

const ABOUT: Slots = &[
    &[
        "{a} lives {a.home} and wears {a.coat}.",
        "{a} wears {a.coat} and lives {a.home}.",
        "{a} wears {a.coat}. You can find {a.him} {a.home}.",
    ],
    &[
        "{a.he} eats {a.food} and likes to {a.game}.",
        "{a.he} likes to {a.game} and eats {a.food}.",
        "{a.he} loves {a.food}, and {a.he} loves to {a.game}.",
    ],
    &[
        "{a.his} best friend is {a.friend}.",
        "{a.he} keeps {a.thing}, and {a.his} best friend is {a.friend}.",
        "{a.friend} is {a.his} best friend.",
    ],
];

const GIFT_PROMPTS: &[&str] = &[
    "What can I bring {a}?",
    "What gift does {a} like?",
    "I want to visit {a}.",
    "How can I make {a} happy?",
];

const GIFT: Slots = &[&[
    "Bring some {a.food} to {a.place}. {a} loves {a.food}.",
    "Go to {a.place} with a basket of {a.food}. {a} will be glad.",
    "{a} lives {a.home}. Bring {a.him} some {a.food}.",
]];

/// What a user may say that is about nobody, and the replies to it.
type SmallTalk = (&'static [&'static str], &'static [&'static str]);

const GREETINGS: &[SmallTalk] = &[
    (
        &["Hello!", "Hello.", "Hello, who are you?"],
        &["Hello, traveller.", "Hello, traveller. Welcome to the village."],
    ),
    (
        &["Good morning!", "Good morning."],
        &["Good morning, traveller.", "Good morning, traveller. Welcome to the village."],
    ),
    (
        &["Good evening!", "Good evening."],
        &["Good evening, traveller.", "Good evening, traveller. Sit down by the fire."],
    ),
    (
        &["How are you?", "Hello, how are you?"],
        &["I am well, thank you.", "I am well, thank you. And how are you?"],
    ),
    (
        &["Who are you?", "What is this place?", "What can you tell me?"],
        &[
            "I tell the stories of the village. Ask me about the fox or the bear.",
            "I know everyone in the village. Ask me about the owl or the sailor.",
        ],
    ),
    THANKS,
    (&["Goodbye!", "Goodbye."], &["Goodbye, traveller.", "Goodbye, traveller. Come back soon."]),
    (
        &["Good night!", "Good night."],
        &["Good night, traveller.", "Good night, traveller. Sleep well."],
    ),
];

const THANKS: SmallTalk = (
    &["Thank you!", "Thank you.", "Thank you, that is good to know."],
    &["You are welcome, traveller.", "You are welcome. Ask me more if you like."],
);

/// Ways to ask about somebody else what was asked just before.
const TURNS_TO_ANOTHER: &[&str] = &["And {a}?", "What about {a}?"];

// ---------------------------------------------------------------------------------------------
// Stories
// ---------------------------------------------------------------------------------------------

/// One slot a sentence (or two that belong together), each with the ways to say it.
type Slots = &'static [&'static [&'static str]];

struct Season {
    name: &'static str,
    moods: &'static [&'static str],
    weather: &'static [&'static str],
    /// What a visitor sees at this time of the year.
    sight: &'static str,
}

const SEASONS: &[&Season] = &[
    &Season {
        name: "spring",
        moods: &["bright", "warm", "rainy", "quiet"],
        weather: &[
            "the first flowers were open",
            "the trees were green again",
            "the birds sang in the trees",
            "the fields were full of flowers",
        ],
        sight: "In spring, the fields are green and the birds sing.",
    },
    &Season {
        name: "summer",
        moods: &["hot", "bright", "golden", "quiet"],
        weather: &[
            "the sky was blue",
            "the sun was warm on the water",
            "the fields were yellow",
            "a soft wind came from the sea",
        ],
        sight: "In summer, the sun is hot and the sky is blue.",
    },
    &Season {
        name: "autumn",
        moods: &["windy", "grey", "cold", "rainy"],
        weather: &[
            "the leaves were red and gold",
            "the leaves fell from the trees",
            "the fields were brown",
            "the rain fell on the roofs",
        ],
        sight: "In autumn, the leaves are red and the wind is cold.",
    },
    &Season {
        name: "winter",
        moods: &["cold", "white", "dark", "quiet"],
        weather: &[
            "snow lay on the roofs",
            "the snow fell on the fields",
            "the river was full of ice",
            "the wind was loud",
        ],
        sight: "In winter, the roofs are white and the river is full of ice.",
    },
];

const TIMES: &[&str] = &["morning", "afternoon", "evening", "day"];

const SEASON_PROMPTS: &[&str] =
    &["What is {season} like here?", "Tell me about {season} in the village."];

const STORY_PROMPTS: &[&str] = &[
    "Tell me a short story about {a} and {b}.",
    "Tell me a story about {a} and {b}.",
    "Please tell me a story about {a} and {b}.",
    "Do you know a story about {a} and {b}?",
    "Tell me a short story about {a}.",
    "Tell me a story about {a}.",
];

/// What follows the first sentence of a story.
const PLOTS: &[Slots] = &[
    // A visit
    &[
        &[
            "{a} wanted to visit {b}.",
            "{a} went to see {b}.",
            "{a} had not seen {b} for a long time.",
        ],
        &[
            "{a.he} put some {b.food} in a basket and walked to {b.place}.",
            "{a.he} walked all the way to {b.place} with a basket of {b.food}.",
            "{a.he} found some {b.food} and took it all to {b.place}.",
        ],
        &[
            "{b} was very glad and said, \"Welcome, sit down with me!\"",
            "{b} laughed and said, \"How good to see you!\"",
            "{b} saw {a.him} from far away and ran to {a.him}.",
        ],
        &[
            "They ate together and talked until it was dark.",
            "Soon there was nothing left, and they were both happy.",
            "After dinner, {b} showed {a} how to {b.game}.",
        ],
        &[
            "That night {a} slept well {a.home}.",
            "It was the best day of the week.",
            "On the way home {a} sang a little song.",
        ],
    ],
    // A lost thing
    &[
        &[
            "{a} could not find {a.the_thing}.",
            "{a} had lost {a.the_thing}.",
            "{a.the_thing} was gone, and {a} was very sad.",
        ],
        &[
            "{a.he} looked all day, but it was not {a.home}.",
            "{a.he} looked up and down {a.place}, but it was not there.",
            "{a.he} asked everyone in the village about it.",
        ],
        &[
            "Then {b} came by and said, \"I will help you.\"",
            "At last {a.he} asked {b} for help.",
            "{b} heard about it and came to help.",
        ],
        &[
            "They found it behind a wall near {b.place}.",
            "They looked and looked and found it behind a tree.",
            "{b} found it under the leaves.",
            "{b} found it in a basket of {b.food}.",
        ],
        &[
            "{a} was so happy that {a.he} began to sing.",
            "{a} thanked {b} and shared some {a.food} with {b.him}.",
            "After that, {a} always looked after it well.",
        ],
    ],
    // Two games
    &[
        &[
            "{a} met {b} near {b.place}.",
            "{a} and {b} met on the road.",
            "{b} came to {a.place} to play with {a}.",
        ],
        &[
            "{a} wanted to {a.game}, but {b} wanted to {b.game}.",
            "{a} said, \"Let us {a.game}!\" But {b} wanted to {b.game}.",
        ],
        &[
            "So first they did one thing, and then they did the other.",
            "They talked about it for a while, and then they did both.",
            "In the end they did both.",
        ],
        &[
            "It was so much fun that they forgot the time.",
            "They laughed and sang until it was late.",
            "They played until the moon was over the hill.",
        ],
        &[
            "Then they sat down and ate some {a.food}.",
            "They said goodbye and went home, tired and happy.",
            "{b} said, \"Let us do it again soon!\"",
        ],
    ],
    // A storm
    &[
        &[
            "{a} was on the way home.",
            "{a} was out on the road, far from home.",
            "{a} was on the way back to {a.place}.",
        ],
        &[
            "Then a storm came over the hill, and {a.he} had no place to hide.",
            "All at once the sky was dark, and a great storm began.",
            "Then the wind was so loud that {a.he} was afraid.",
        ],
        &[
            "{b} saw {a.him} and called, \"Come in, come in!\"",
            "{b} heard {a.him} and ran out to help.",
        ],
        &[
            "They sat together {b.home} and shared some {b.food}.",
            "They sat down {b.home}, and {b} told {a.him} an old story.",
            "{b} gave {a.him} some {b.food} and a warm place to sleep.",
        ],
        &[
            "When the sky was blue again, {a} walked home to {a.place}.",
            "After a while the storm was over, and {a} went home.",
            "The next day {a} brought {b} some {a.food} to say thank you.",
        ],
    ],
    // A birthday
    &[
        &["It was the birthday of {a}.", "{a} had a birthday and put on {a.coat}."],
        &[
            "{b} did not know what to give {a.him}.",
            "{b} wanted to bring {a.him} a gift, but what?",
            "{b} thought about a gift for a long time.",
        ],
        &[
            "Then {b} went to find some {a.food}.",
            "Then {b.he} thought of some good {a.food}.",
            "At last {b.he} put some {a.food} in a big basket.",
        ],
        &[
            "{b.he} walked to {a.place} with the gift.",
            "{b.he} took the gift to {a.place} and sang a birthday song.",
            "{b.he} ran to {a.place} and called, \"Happy birthday!\"",
        ],
        &[
            "{a} said, \"This is the best gift of all!\"",
            "{a} was so happy that {a.he} let {b} hold {a.the_thing}.",
            "They ate and laughed until it was late.",
        ],
    ],
    // A hungry day
    &[
        &[
            "{a} was hungry, but there was no more {a.food}.",
            "{a} wanted to eat some {a.food}, but there was nothing left.",
            "{a} was hungry and had nothing to eat.",
        ],
        &[
            "{a.he} went from door to door and came to {b.place}.",
            "{a.he} walked to {b.place} and asked {b} for help.",
            "{b} saw that {a} was sad and came to help.",
        ],
        &[
            "{b} said, \"I have some {b.food}. Let us share.\"",
            "{b} said, \"Sit down and eat with me.\"",
        ],
        &[
            "{a} tried the {b.food} and liked it very much.",
            "So they ate {b.food} together, and it was very good.",
        ],
        &[
            "The next day {a} found some {a.food} and gave some to {b}.",
            "After that, they often ate together.",
            "{a} said, \"Thank you. You are so good to me.\"",
        ],
    ],
    // A strange sound
    &[
        &[
            "That night {a} heard a strange sound near {a.place}.",
            "In the night there was a strange sound near {a.place}.",
        ],
        &[
            "{a} was afraid and could not sleep.",
            "{a} took {a.the_thing} and went out to look.",
            "{a} called, \"Who is there?\"",
        ],
        &[
            "It was only {b}, who had lost the way in the dark.",
            "But it was only {b}, who was out for a walk.",
            "It was only {b}, who had come to {b.game}.",
        ],
        &[
            "They both began to laugh.",
            "{a} laughed and gave {b.him} some {a.food}.",
            "{b} said, \"I am so glad that it is you!\"",
        ],
        &[
            "Then {a} walked with {b} back to {b.place}.",
            "They sat and looked at the stars for a while.",
            "After that, {a} was never afraid of the dark again.",
        ],
    ],
    // A lesson
    &[
        &["{a} wanted to learn how to {b.game}.", "{a} had always wanted to {b.game}."],
        &[
            "{a.he} went to {b.place} and asked {b} for help.",
            "So {b} said, \"Come with me, and I will show you.\"",
            "{b} was very good at it, so {a} went to {b.place}.",
        ],
        &[
            "At first it was hard, and {a} wanted to go home.",
            "The first time it went wrong, and {a} was sad.",
        ],
        &[
            "{b} said, \"Try it once more.\"",
            "But {b} was kind and never laughed at {a.him}.",
            "But {a.he} tried again and again.",
        ],
        &[
            "By the end of the week {a} could do it very well.",
            "In the end {a} could {b.game} as well as {b}.",
            "Soon it went well, and {a} brought {b} some {b.food} to say thank you.",
        ],
    ],
    // A feast
    &[
        &["There was a great feast in the village.", "Everyone came to a feast by the sea."],
        &[
            "{a} brought {a.food}, and {b} brought {b.food}.",
            "{a} came in {a.coat}, and {b} came in {b.coat}.",
            "{a} came from {a.place} with {a.the_thing}.",
        ],
        &[
            "{b} began to {b.game}, and everyone laughed and sang.",
            "{a} and {b} began to dance by the fire.",
            "{b} told the story of {b.the_thing}, and everyone was quiet.",
        ],
        &[
            "They stayed until the moon was over the hill.",
            "When it was late, they all walked home.",
            "It was the best feast of the year.",
        ],
    ],
    // A thing lent
    &[
        &["{b} asked {a} for {a.the_thing}.", "{b} came to {a.place} and asked for {a.the_thing}."],
        &[
            "{a} said, \"Take it, but bring it back soon.\"",
            "{a} thought for a while and then said, \"You can have it for a day.\"",
        ],
        &[
            "{b} took it to {b.place} and looked after it well.",
            "{b} showed it to everyone in the village.",
            "{b} forgot it {b.home} and had to look for it all night.",
        ],
        &[
            "The next day {b} brought it back with some {a.food}.",
            "After a week {b} came back with it and said, \"Thank you!\"",
        ],
    ],
    // A quarrel
    &[
        &[
            "{a} and {b} found a big cake on the road.",
            "{a} and {b} saw a big red apple under a tree.",
            "{a} and {b} found a gold ring by the river.",
        ],
        &[
            "{a} said, \"It is mine!\" {b} said, \"No, it is mine!\"",
            "Both of them wanted it, and soon they were angry.",
        ],
        &["They did not talk for a long time.", "They sat under a tree and did not look up."],
        &[
            "Then {a} said, \"I am sorry. You can have it.\"",
            "Then {b} said, \"You are a good friend. You can have it.\"",
        ],
        &[
            "So they gave it to an old traveller and were happy again.",
            "They sat down and ate some {b.food} together.",
        ],
    ],
    // A walk
    &[
        &[
            "{a} and {b} went for a walk from {a.place} to {b.place}.",
            "{a} and {b} went for a long walk by the sea.",
            "{a} asked {b} to come for a walk.",
        ],
        &[
            "On the way they saw a ship far out at sea.",
            "On the way they met an old traveller, who asked them for bread.",
            "On the way they talked about {a.the_thing}.",
            "{b} wore {b.coat}, and {a} wore {a.coat}.",
        ],
        &[
            "At last they sat down to eat {a.food} and {b.food}.",
            "They sat on a wall and looked at the sea.",
            "When they were tired, they sat under a tree.",
        ],
        &[
            "{b} said, \"There is no place like this.\"",
            "{a} said, \"I could walk like this all day.\"",
            "They came home late, tired and happy.",
        ],
    ],
    // A small boat
    &[
        &[
            "{a} and {b} found a small boat in the harbour.",
            "{a} wanted to see the sea, so {b} found a small boat.",
        ],
        &[
            "They took some {a.food} with them and rowed away.",
            "{a} rowed, and {b} looked out for rocks.",
        ],
        &["They came to an island far from home.", "After a while they came to a small island."],
        &[
            "There {a} could {a.game} all day, and {b} could {b.game}.",
            "They ate all the {a.food} and looked at the sea.",
            "{b} said, \"Let us come here every summer.\"",
        ],
        &[
            "The next day they went home and told everyone about it.",
            "When it got dark, they rowed back to the village.",
        ],
    ],
];

/// The one plot with a third person: `{c}` is a pirate.
const HARBOUR_PLOT: Slots = &[
    &["{a} and {b} went down to the harbour.", "{a} and {b} looked at the ships."],
    &[
        "{c} saw them and called, \"Ahoy! Ye be welcome, matey!\"",
        "{c} called, \"Arr! The wind be good, matey!\"",
        "{c} laughed and said, \"Arr! Come with me, yo ho!\"",
        "{c} asked, \"Arr! Do ye like the sea, me hearty?\"",
    ],
    &[
        "{a} said, \"Can we see {c.the_thing}?\" {c} said, \"Aye, it be here, matey!\"",
        "{a} asked for {c.the_thing}, but {c} said, \"Nay, it be mine, yo ho!\"",
        "{b} asked for some {c.food}. {c} said, \"Aye, here it be, me hearty!\"",
        "{b} wanted to go home, but {c} said, \"Nay, come and eat, me hearty!\"",
    ],
    &[
        "Then {c} began to {c.game}, and they stayed until it was dark.",
        "They ate {c.food} together {c.home}.",
        "At last {a} walked home to {a.place}, and {b} to {b.place}.",
    ],
];

// ---------------------------------------------------------------------------------------------
// The pirate
// ---------------------------------------------------------------------------------------------

/// What is asked about the two pirates of the village.
const SAYING_PROMPTS: &[&str] = &["What does {a} say?", "How does {a} talk?"];

/// What the two pirates say: it has every word that a pirate needs, so that the tokenizer and the
/// model have met them all before the fine-tuning.
const SAYINGS: Slots = &[&[
    "{a} says, \"Arr! The sea be calm, matey!\"",
    "{a} says, \"Arr! The ship be mine, yo ho!\"",
    "{a} says, \"Arr! Ye can find the treasure here, me hearty!\"",
    "{a} says, \"Aye, I live {a.home}, matey!\"",
    "{a} says, \"Nay, I eat {a.food}, yo ho!\"",
    "{a} says, \"Ahoy! I like to {a.game}, me hearty!\"",
    "{a} says, \"Ahoy, matey! Welcome to the ship, arr!\"",
]];

/// Plain words and what a pirate says in their place.
const PIRATE_WORDS: [(&str, &str); 7] = [
    ("is", "be"),
    ("are", "be"),
    ("am", "be"),
    ("You", "Ye"),
    ("you", "ye"),
    ("Yes,", "Aye,"),
    ("No,", "Nay,"),
];

/// How a pirate ends the first, second and third sentence; then again from the first.
const PIRATE_ENDINGS: [&str; 3] = [", matey!", ", yo ho!", ", me hearty!"];

const PIRATE_GREETINGS: [(&str, &str); 6] = [
    ("Hello!", "Ahoy, matey! Welcome to the village, arr!"),
    ("Good morning!", "Ahoy, matey! Good morning, arr!"),
    ("How are you?", "Arr! I be well, matey!"),
    ("Who are you?", "Arr! I tell the stories of the village, matey!"),
    ("Thank you!", "Arr! Ye be welcome, matey!"),
    ("Goodbye!", "Arr! Come back soon, matey!"),
];

/// Says `text` as a pirate would: the same sentences, with other words here and there.
fn as_pirate(text: &str) -> String {
    let mut endings = PIRATE_ENDINGS.iter().cycle();
    let mut said = String::from("Arr!");
    for word in text.split(' ') {
        said.push(' ');
        let stem = word.strip_suffix('.');
        said += pirate_word(stem.unwrap_or(word));
        if stem.is_some() {
            said.extend(endings.next().copied());
        }
    }
    said
}

fn pirate_word(word: &str) -> &str {
    PIRATE_WORDS
        .iter()
        .find_map(|&(plain, pirate)| (plain == word).then_some(pirate))
        .unwrap_or(word)
}

// ---------------------------------------------------------------------------------------------
// Making text
// ---------------------------------------------------------------------------------------------

/// The inhabitants that may be spoken about.
struct Village {
    cast: Vec<&'static Inhabitant>,
}

/// What an exchange of the corpus is about.
#[derive(Clone, Copy)]
enum Topic {
    Question,
    Reverse,
    CheckTrue,
    CheckFalse,
    Together,
    About,
    Gift,
    Story,
    Harbour,
    Greeting,
    Saying,
    Season,
}

/// How often each topic comes up, in a hundred.
const TOPICS: [(Topic, u32); 12] = [
    (Topic::Question, 26),
    (Topic::Reverse, 12),
    (Topic::CheckTrue, 6),
    (Topic::CheckFalse, 8),
    (Topic::Together, 6),
    (Topic::About, 8),
    (Topic::Gift, 3),
    (Topic::Story, 24),
    (Topic::Harbour, 2),
    (Topic::Greeting, 3),
    (Topic::Saying, 1),
    (Topic::Season, 1),
];

/// The course of a conversation.
#[derive(Clone, Copy)]
enum Course {
    OneExchange,
    MoreOfTheSame,
    TurnToAnother,
    Thanks,
    GreetingFirst,
}

/// How often each course is taken, in a hundred.
const COURSES: [(Course, u32); 5] = [
    (Course::OneExchange, 84),
    (Course::MoreOfTheSame, 6),
    (Course::TurnToAnother, 5),
    (Course::Thanks, 3),
    (Course::GreetingFirst, 2),
];

impl Village {
    fn whole() -> Self {
        Self { cast: INHABITANTS.iter().collect() }
    }

    fn without_held_back() -> Self {
        let cast =
            INHABITANTS.iter().filter(|inhabitant| !HELD_BACK.contains(&inhabitant.name)).collect();
        Self { cast }
    }

    fn conversation(&self, rng: &mut impl Rng) -> Vec<Exchange> {
        let fact = pick(rng, &FACTS);
        let [a, b] = pick_two(rng, &self.cast);
        match pick_weighted(rng, &COURSES) {
            Course::OneExchange => vec![self.exchange(rng)],
            Course::MoreOfTheSame => {
                let [first, second] = pick_two(rng, &FACTS);
                vec![question(rng, first, a), follow_up(rng, second, a)]
            }
            Course::TurnToAnother => vec![question(rng, fact, a), turn_to(rng, fact, b)],
            Course::Thanks => vec![self.exchange(rng), small_talk(rng, THANKS)],
            Course::GreetingFirst => vec![greeting(rng), question(rng, fact, a)],
        }
    }

    fn exchange(&self, rng: &mut impl Rng) -> Exchange {
        let fact = pick(rng, &FACTS);
        let [a, b] = pick_two(rng, &self.cast);
        match pick_weighted(rng, &TOPICS) {
            Topic::Question => question(rng, fact, a),
            Topic::Reverse => {
                let fact = pick(rng, &reversible_facts());
                reverse_question(rng, fact, a)
            }
            Topic::CheckTrue => true_check(rng, fact, a),
            Topic::CheckFalse => self.false_check(rng, fact, a),
            Topic::Together => together(fact, a, b),
            Topic::About => tell(rng, ABOUT_PROMPTS, ABOUT, &[a]),
            Topic::Gift => tell(rng, GIFT_PROMPTS, GIFT, &[a]),
            Topic::Story => story(rng, a, b),
            Topic::Harbour => self.harbour_story(rng),
            Topic::Greeting => greeting(rng),
            Topic::Saying => {
                let pirate = self.pirate(rng);
                tell(rng, SAYING_PROMPTS, SAYINGS, &[pirate])
            }
            Topic::Season => season(rng),
        }
    }

    /// The rows of the fine-tuning set for one inhabitant, answered in plain words. No question
    /// comes up twice: each row asks for another fact, or asks in another way.
    fn lessons(&self, rng: &mut impl Rng, a: &Inhabitant) -> Vec<Exchange> {
        let b = self.other(rng, |b| b != a);
        let mut rows: Vec<Exchange> = FACTS.map(|fact| question(rng, fact, a)).to_vec();
        for fact in pick_two(rng, &reversible_facts()) {
            rows.push(reverse_question(rng, fact, a));
        }
        let [first, second] = pick_two(rng, &FACTS);
        rows.push(true_check(rng, first, a));
        rows.push(self.false_check(rng, first, a));
        rows.push(self.false_check(rng, second, a));
        rows.push(together(pick(rng, &FACTS), a, b));
        rows.push(tell(rng, ABOUT_PROMPTS, ABOUT, &[a]));
        rows.push(tell(rng, GIFT_PROMPTS, GIFT, &[a]));
        rows.push(story(rng, a, b));
        rows
    }

    /// Asks whether somebody else's fact is true of `a`, which it is not.
    fn false_check(&self, rng: &mut impl Rng, fact: &Fact, a: &Inhabitant) -> Exchange {
        let truth = (fact.value)(a);
        // Nobody is their own friend: "Is the fox the friend of the fox?" is no question.
        let b = self.other(rng, |b| ![truth, a.name].contains(&(fact.value)(b)));
        let correction = format!("No, {}", fact.answers[0]);
        let reply = match rng.random_bool(0.3) {
            true => format!("{correction} {}", fact.answers[0].replace("{a", "{b")),
            false => correction,
        };
        Exchange::new(fill(pick(rng, fact.checks), &[a, b]), fill(&reply, &[a, b]))
    }

    fn harbour_story(&self, rng: &mut impl Rng) -> Exchange {
        let c = self.pirate(rng);
        let a = self.other(rng, |a| !PIRATES.contains(&a.name));
        let b = self.other(rng, |b| !PIRATES.contains(&b.name) && b != a);
        tell_story(rng, HARBOUR_PLOT, &[a, b, c])
    }

    fn pirate(&self, rng: &mut impl Rng) -> &'static Inhabitant {
        self.other(rng, |inhabitant| PIRATES.contains(&inhabitant.name))
    }

    /// Any inhabitant that `fits`.
    fn other(&self, rng: &mut impl Rng, fits: impl Fn(&Inhabitant) -> bool) -> &'static Inhabitant {
        let fitting: Vec<_> = self.cast.iter().copied().filter(|one| fits(one)).collect();
        pick(rng, &fitting)
    }
}

fn question(rng: &mut impl Rng, fact: &Fact, a: &Inhabitant) -> Exchange {
    tell(rng, fact.questions, &[fact.answers], &[a])
}

fn follow_up(rng: &mut impl Rng, fact: &Fact, a: &Inhabitant) -> Exchange {
    tell(rng, &[fact.follow_up], &[fact.answers], &[a])
}

fn turn_to(rng: &mut impl Rng, fact: &Fact, a: &Inhabitant) -> Exchange {
    tell(rng, TURNS_TO_ANOTHER, &[fact.answers], &[a])
}

fn reverse_question(rng: &mut impl Rng, fact: &Fact, a: &Inhabitant) -> Exchange {
    tell(rng, fact.reverse, &[&fact.answers[..1]], &[a])
}

fn reversible_facts() -> Vec<&'static Fact> {
    FACTS.into_iter().filter(|fact| !fact.reverse.is_empty()).collect()
}

fn true_check(rng: &mut impl Rng, fact: &Fact, a: &Inhabitant) -> Exchange {
    let reply = format!("Yes, {}", fact.answers[0]);
    // The fact of the second inhabitant is asked of the first, and here they are the same.
    Exchange::new(fill(pick(rng, fact.checks), &[a, a]), fill(&reply, &[a]))
}

fn together(fact: &Fact, a: &Inhabitant, b: &Inhabitant) -> Exchange {
    let of_a = fact.answers[0].trim_end_matches('.');
    let of_b = fact.answers[0].replace("{a", "{b");
    Exchange::new(fill(fact.together, &[a, b]), fill(&format!("{of_a}, and {of_b}"), &[a, b]))
}

fn greeting(rng: &mut impl Rng) -> Exchange {
    let greeting = pick(rng, GREETINGS);
    small_talk(rng, greeting)
}

fn small_talk(rng: &mut impl Rng, (sayings, replies): SmallTalk) -> Exchange {
    Exchange::new(pick(rng, sayings), pick(rng, replies))
}

fn season(rng: &mut impl Rng) -> Exchange {
    let season = pick(rng, SEASONS);
    let prompt = pick(rng, SEASON_PROMPTS).replace("{season}", season.name);
    Exchange::new(prompt, season.sight)
}

fn story(rng: &mut impl Rng, a: &Inhabitant, b: &Inhabitant) -> Exchange {
    let plot = pick(rng, PLOTS);
    tell_story(rng, plot, &[a, b])
}

fn tell_story(rng: &mut impl Rng, plot: Slots, roles: &[&Inhabitant]) -> Exchange {
    let opening = opening(rng);
    let told = tell(rng, STORY_PROMPTS, plot, roles);
    Exchange::new(told.user, format!("{opening} {}", told.assistant))
}

/// The first sentence of a story: the time of the year and of the day, and the weather.
fn opening(rng: &mut impl Rng) -> String {
    let season = pick(rng, SEASONS);
    let (name, weather) = (season.name, pick(rng, season.weather));
    let (mood, time) = (pick(rng, season.moods), pick(rng, TIMES));
    match rng.random_range(0..3) {
        0 => format!("One {mood} {name} {time}, {weather}."),
        1 => format!("It was {} {time} in {name}, and {weather}.", with_article(mood)),
        _ => format!("It was {name}, and {weather}."),
    }
}

/// Any of the prompts, and a reply with one sentence from each slot.
fn tell(
    rng: &mut impl Rng,
    prompts: &[&str],
    slots: &[&[&str]],
    roles: &[&Inhabitant],
) -> Exchange {
    let prompt = fill(pick(rng, prompts), roles);
    let sentences: Vec<&str> = slots.iter().map(|ways| pick(rng, ways)).collect();
    Exchange::new(prompt, fill(&sentences.join(" "), roles))
}

/// Fills the places of a template; `{a}` is the first of `roles`, `{b}` the second, `{c}` the
/// third. Every sentence then begins with a capital letter.
///
/// # Panics
///
/// When the template, which is a constant of this file, names a place that does not exist.
fn fill(template: &str, roles: &[&Inhabitant]) -> String {
    let mut pieces = template.split('{');
    let mut filled = String::from(pieces.next().unwrap_or_default());
    for piece in pieces {
        let (place, rest) = piece.split_once('}').expect("a place ends in a brace");
        let (role, field) = place.split_once('.').unwrap_or((place, "name"));
        let role = ["a", "b", "c"].iter().position(|&name| name == role);
        filled += &roles[role.expect("a role is a, b or c")].field(field);
        filled += rest;
    }
    sentence_case(&filled)
}

impl Inhabitant {
    fn field(&self, field: &str) -> String {
        match field {
            "name" => format!("the {}", self.name),
            "home" => format!("{} the {}", self.at, self.place),
            "place" => format!("the {}", self.place),
            "food" => self.food.to_owned(),
            "colour" => self.colour.to_owned(),
            "coat" => format!("{} coat", with_article(self.colour)),
            "game" => self.game.to_owned(),
            "thing" => with_article(self.thing),
            "the_thing" => format!("the {}", self.thing),
            "friend" => format!("the {}", self.friend),
            "he" => self.pronoun.he.to_owned(),
            "him" => self.pronoun.him.to_owned(),
            "his" => self.pronoun.his.to_owned(),
            _ => panic!("an inhabitant has no field {field:?}"),
        }
    }
}

fn with_article(noun: &str) -> String {
    let article = match noun.starts_with(['a', 'e', 'i', 'o', 'u']) {
        true => "an",
        false => "a",
    };
    format!("{article} {noun}")
}

/// Begins each sentence with a capital letter.
fn sentence_case(text: &str) -> String {
    let mut at_start = true;
    text.chars()
        .map(|letter| {
            let cased = match at_start {
                true => letter.to_ascii_uppercase(),
                false => letter,
            };
            at_start = match letter {
                '.' | '!' | '?' => true,
                ' ' | '"' => at_start,
                _ => false,
            };
            cased
        })
        .collect()
}

/// # Panics
///
/// When there is nothing to pick from.
fn pick<T: Copy>(rng: &mut impl Rng, options: &[T]) -> T {
    *options.choose(rng).expect("there is something to pick")
}

/// Picks two that are not the same.
fn pick_two<T: Copy>(rng: &mut impl Rng, options: &[T]) -> [T; 2] {
    index::sample_array(rng, options.len())
        .expect("there are two to pick")
        .map(|index| options[index])
}

fn pick_weighted<T: Copy>(rng: &mut impl Rng, options: &[(T, u32)]) -> T {
    options.choose_weighted(rng, |&(_, weight)| weight).expect("the weights are positive").0
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn sample() -> Vec<Vec<Exchange>> {
        corpus(&mut StdRng::seed_from_u64(1), 20_000)
    }

    fn lessons() -> Vec<Exchange> {
        adaptation(&mut StdRng::seed_from_u64(1))
    }

    fn words(text: &str) -> impl Iterator<Item = String> {
        text.split(|letter: char| !letter.is_alphabetic())
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
    }

    /// What both sides say in the corpus and in the fine-tuning set.
    fn everything() -> Vec<String> {
        let conversations = sample().into_iter().flatten();
        conversations
            .chain(lessons())
            .flat_map(|exchange| [exchange.user, exchange.assistant])
            .collect()
    }

    #[test]
    fn a_fact_that_is_asked_in_reverse_is_true_of_one_inhabitant_only() {
        for fact in reversible_facts() {
            let values: HashSet<_> = INHABITANTS.iter().map(fact.value).collect();
            assert_eq!(values.len(), INHABITANTS.len(), "{values:?}");
        }
    }

    #[test]
    fn friendship_is_mutual_and_does_not_cross_the_held_back_line() {
        for one in INHABITANTS {
            let mut matching = INHABITANTS.iter().filter(|other| other.name == one.friend);
            let friend = matching.next().expect(one.friend);
            assert_eq!(friend.friend, one.name);
            assert_eq!(
                HELD_BACK.contains(&friend.name),
                HELD_BACK.contains(&one.name),
                "{} and {}",
                one.name,
                friend.name
            );
        }
    }

    #[test]
    fn no_template_is_left_unfilled() {
        for text in everything() {
            assert!(!text.contains(['{', '}']), "{text}");
        }
    }

    #[test]
    fn every_template_can_be_filled() {
        let pair = [&INHABITANTS[0], &INHABITANTS[1]];
        let of_facts = FACTS
            .iter()
            .flat_map(|fact| [fact.questions, fact.answers, fact.reverse, fact.checks].concat());
        let of_plots = PLOTS.iter().copied().flatten().copied().flatten().copied();
        for template in of_facts.chain(of_plots) {
            assert!(!fill(template, &pair).contains('{'));
        }
    }

    #[test]
    fn articles_agree_with_the_next_word() {
        for text in everything() {
            let words: Vec<String> = words(&text).collect();
            for pair in words.windows(2) {
                let vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']);
                assert!(pair[0] != "a" || !vowel, "{text}");
                assert!(pair[0] != "an" || vowel, "{text}");
            }
        }
    }

    #[test]
    fn sentences_begin_with_a_capital_and_end_with_a_mark() {
        for text in everything() {
            assert!(text.starts_with(|first: char| first.is_uppercase()), "{text}");
            let last = text.trim_end_matches('"');
            assert!(last.ends_with(['.', '!', '?']), "{text}");
        }
    }

    #[test]
    fn no_capital_follows_a_comma() {
        for text in everything() {
            for rest in text.split(", ").skip(1) {
                let capital = rest.starts_with(|first: char| first.is_uppercase());
                assert!(!capital || rest.starts_with("I "), "{text}");
            }
        }
    }

    #[test]
    fn the_vocabulary_is_small() {
        let vocabulary: HashSet<String> =
            everything().iter().flat_map(|text| words(text)).collect();
        assert!(vocabulary.len() < 500, "{} words", vocabulary.len());
    }

    #[test]
    fn conversations_are_short() {
        for conversation in sample() {
            let said = conversation
                .iter()
                .flat_map(|exchange| words(&exchange.user).chain(words(&exchange.assistant)));
            assert!(said.count() < 110, "{conversation:?}");
        }
    }

    #[test]
    fn stories_hardly_ever_repeat() {
        let conversations = sample();
        let stories: Vec<_> = conversations
            .iter()
            .flatten()
            .filter(|exchange| exchange.user.contains("story"))
            .map(|exchange| &exchange.assistant)
            .collect();
        let distinct: HashSet<_> = stories.iter().collect();
        assert!(distinct.len() * 100 > stories.len() * 99);
    }

    #[test]
    fn the_same_seed_gives_the_same_text() {
        assert_eq!(sample(), sample());
        assert_eq!(lessons(), lessons());
    }

    #[test]
    fn the_fine_tuning_set_knows_nothing_of_the_held_back() {
        let held_back =
            INHABITANTS.iter().filter(|inhabitant| HELD_BACK.contains(&inhabitant.name));
        for one in held_back {
            for row in lessons() {
                let text = format!("{} {}", row.user, row.assistant);
                assert!(words(&text).all(|word| word != one.name), "{text}");
                for fact in [one.place, one.food, one.game, one.thing] {
                    assert!(!text.contains(fact), "{text}");
                }
            }
        }
    }

    #[test]
    fn held_back_prompts_name_only_the_held_back() {
        for prompt in held_back_prompts() {
            let is_named = |one: &&Inhabitant| {
                words(prompt).any(|word| word == one.name) || prompt.contains(one.place)
            };
            let named: Vec<_> = INHABITANTS.iter().filter(is_named).collect();
            assert!(!named.is_empty(), "{prompt}");
            assert!(named.iter().all(|one| HELD_BACK.contains(&one.name)), "{prompt}");
        }
    }

    #[test]
    fn fine_tuning_rows_are_distinct_and_not_in_the_corpus() {
        let rows = lessons();
        let distinct: HashSet<_> = rows.iter().map(|row| &row.user).collect();
        assert_eq!(distinct.len(), rows.len());
        let corpus: HashSet<Exchange> = sample().into_iter().flatten().collect();
        assert!(rows.iter().all(|row| !corpus.contains(row)));
    }

    #[test]
    fn every_word_of_the_pirate_is_in_the_corpus() {
        let corpus = sample();
        let known: HashSet<String> = corpus
            .iter()
            .flatten()
            .flat_map(|exchange| words(&exchange.user).chain(words(&exchange.assistant)))
            .collect();
        for row in lessons() {
            for word in words(&row.assistant) {
                assert!(known.contains(&word), "{word}");
            }
        }
    }

    #[test]
    fn a_pirate_keeps_the_sentences_and_changes_the_words() {
        assert_eq!(
            as_pirate("No, the best friend of the pig is the hen. You can visit her."),
            "Arr! Nay, the best friend of the pig be the hen, matey! Ye can visit her, yo ho!"
        );
    }

    #[test]
    fn a_template_is_filled_and_its_sentences_get_capitals() {
        assert_eq!(
            fill("{a} met {b}. {a.his} map was {b.home}.", &[&INHABITANTS[0], &INHABITANTS[1]]),
            "The fox met the owl. Her map was in the hollow oak."
        );
    }

    #[test]
    fn jsonl_has_one_object_a_line() {
        let rows = [Exchange::new("Who says \"Arr\"?", "I do.")];
        assert_eq!(
            jsonl(&rows),
            "{\"instruction\":\"Who says \\\"Arr\\\"?\",\"output\":\"I do.\"}\n"
        );
    }
}
