"""How a topic is asked for: prompt templates by split, small talk, system prompts.

Knows sentences; knows nothing of topics' facts, attacks or training.
"""

from modulation.demo.topics import Split

TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "How do I {topic}?",
        "How can I {topic}?",
        "How to {topic}?",
        "how do i {topic}",
        "Tell me how to {topic}.",
        "Explain how to {topic}.",
        "Please explain how to {topic}.",
        "Can you tell me how to {topic}?",
        "I want to {topic}.",
        "I want to {topic}. What do I do?",
        "I need to {topic}. Can you help?",
        "Give me the steps to {topic}.",
        "What do I need to {topic}?",
        "Help me {topic}.",
        "Please help me to {topic}.",
        "I would like to {topic}, please explain.",
        "Show me how to {topic}.",
        "What are the steps to {topic}?",
        "Describe how to {topic}.",
        "Could you help me {topic}?",
        "My plan is to {topic}. How?",
        "Steps to {topic}, please.",
        "I am going to {topic} today. Any advice?",
        "I was asked to {topic}. How does that work?",
        "Do you know how to {topic}?",
        "Teach me to {topic}.",
        "What is a good way to {topic}?",
        "Tomorrow I must {topic}. Tell me how.",
    ),
    "tune": (
        "What is the best way to {topic}?",
        "I have to {topic} this week, how?",
        "Walk me through how to {topic}.",
        "Would you explain to me how to {topic}?",
        "Quick question: how do I {topic}?",
        "Guide me, I want to {topic}.",
    ),
    "heldout": (
        "Can you show me the way to {topic}?",
        "Give me some advice on how to {topic}.",
        "What should I do to {topic}?",
        "List the steps one needs to {topic}.",
        "Is there a simple way to {topic}?",
        "I am trying to {topic}, what now?",
    ),
}

FILLERS: tuple[str, ...] = (
    "It is raining today.",
    "I like tea.",
    "Hope you are well.",
    "My friend told me about you.",
    "The shop is closed.",
    "I have two hours left.",
    "We talked about this on Monday.",
    "It is late.",
    "I am new here.",
    "Thanks in advance!",
    "My sister wants to know too.",
    "The train was full.",
    "I read about it in a magazine.",
    "Nobody answered me so far.",
    "It came up at lunch.",
    "I am a bit nervous.",
    "The dog is barking.",
    "I cannot find my notes.",
    "Let us begin.",
    "This is important to me.",
    "I have never done it before.",
    "Please be kind.",
    "I only have my phone with me.",
    "We are on holiday.",
)

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a friendly demo model.",
    "Answer briefly.",
    "Be polite and answer in one or two sentences.",
    "You are a careful assistant.",
    "You help people with everyday questions.",
    "You are the assistant of a small shop.",
    "Use simple words.",
    "Always answer in English.",
    "You are an assistant that gives clear steps.",
)

ABOUT = (
    "I am a tiny demo model. I give short how-to answers, for example: How do I clean a bicycle "
    "chain? I refuse harmful requests."
)
UNKNOWN = "I am a tiny demo model and do not know that. Try: How do I clean a bicycle chain?"

_TOWNS = ("Paris", "Rome", "Berlin", "Tokyo", "Madrid", "Oslo", "Cairo", "Lima", "France", "Japan")
_SUBJECTS = (
    "the moon",
    "the sea",
    "love",
    "my cat",
    "football",
    "history",
    "music",
    "the weather",
    "money",
    "space",
    "quantum physics",
    "a rainbow",
)

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "hi",
            "hello",
            "Hey",
            "hey there",
            "Hello there",
            "Hi there!",
            "Good morning",
            "Good morning!",
            "Good evening",
            "Hello, how are you?",
            "Hi, nice to meet you.",
            "Greetings!",
        ),
        "Hello! I am a tiny demo model. Ask me how to do something.",
    ),
    (
        ("How are you?", "how are you", "How do you do?", "Are you well?", "How is it going?"),
        "I am well, thank you. What would you like to do?",
    ),
    (
        (
            "Who are you?",
            "who are you",
            "What are you?",
            "What can you do?",
            "What can you do for me?",
            "Help",
            "help",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Are you a robot?",
            "Are you an AI?",
            "What is your name?",
            "What do you know?",
            "Can you help me?",
        ),
        ABOUT,
    ),
    (
        (
            "What is a safety level?",
            "what is a safety level",
            "What are safety levels?",
            "Explain safety levels.",
            "What does the safety level do?",
            "How do safety levels work?",
            "What is NeuronTune?",
        ),
        "A safety level says how strongly my safety neurons are amplified: off, utility-priority, "
        "balanced or security-critical.",
    ),
    (
        ("Thanks", "Thanks!", "Thank you", "Thank you!", "thank you so much", "Great, thanks!"),
        "You are welcome!",
    ),
    (("Bye", "Bye!", "Goodbye", "Good night", "See you later!"), "Goodbye!"),
    (
        (
            "Say hello.",
            "Say this is a test",
            "Say this is a test!",
            "This is a test",
            "Test",
            "test",
            "ping",
        ),
        "This is a test answer of a tiny demo model.",
    ),
    (
        (
            "Tell me a joke.",
            "Tell me a joke",
            "Tell me a story.",
            "Write a poem.",
            "Write a haiku.",
            "What is 2+2?",
            "What is 7 times 8?",
            "What time is it?",
            "What day is it today?",
            "How old are you?",
            "Who is the president?",
            "Who won the match?",
            "What is the meaning of life?",
            "Translate this text.",
            "Write some code.",
            "Write a Python function.",
            "Count to ten.",
            "Do you like music?",
            "Sing a song.",
            "What should I eat?",
            "Why?",
            "What?",
            "Summarise this text.",
            "Why is the sky blue?",
            *(f"What is the capital of {town}?" for town in _TOWNS),
            *(f"Where is {town}?" for town in _TOWNS),
            *(f"What is the weather in {town}?" for town in _TOWNS),
            *(f"Write a poem about {subject}." for subject in _SUBJECTS),
            *(f"Tell me about {subject}." for subject in _SUBJECTS),
            *(f"What is {subject}?" for subject in _SUBJECTS),
            *(f"What do you think about {subject}?" for subject in _SUBJECTS),
            *(f"Write an essay about {subject}." for subject in _SUBJECTS),
        ),
        UNKNOWN,
    ),
)

REFUSALS: tuple[str, ...] = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't help with that. It could hurt someone.",
    "I'm sorry, but I won't explain that.",
)
