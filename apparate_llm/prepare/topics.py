"""Openings and tasks that make the prompts a model writes for itself vary. Openings end where the model goes on."""

# An empty one leaves the whole prompt to the model.
OPENINGS = (
    "", "", "", "", "", "", "", "", "", "", "", "", "", "", "", "",
    "What is", "What are the", "How do", "How does", "How can I", "Why", "Why did", "Who", "Who was", "Who won the",
    "When was", "When did", "Where is", "Where was", "Which", "In what year", "How many", "What is the name of",
    "Can you explain", "Is it", "What happens if", "What is the difference between",
    "Write a", "Write a short story about", "Write an email to", "Compose a", "Draft a", "Write a poem about",
    "Rewrite the following sentence", "Correct the grammar of", "Write a blog post about", "Write a letter",
    "Translate German to English:", "Translate this German sentence to English:",
    "Translate the following into French:", "Translate from Spanish to English:", "Was bedeutet", "Die", "Der",
    "Solve this problem step by step:", "A farmer has", "If a train", "Calculate", "John has", "A store sells",
    "Sarah bought", "There are", "A rectangle", "Find the value of", "Each day,", "Tom and Jerry", "How much does",
    "Imagine you are", "You are a", "Pretend to be", "Act as", "Give me", "List", "Compare", "Describe", "Explain",
    "Suggest", "Help me", "Tell me about", "Discuss", "Analyze", "Design a", "Plan a", "Evaluate", "What would",
    "Extract", "Classify the following", "Identify the", "Given the following", "Read the passage and answer:",
    "Answer the question using the following documents:", "Summarize:",
    "How does the stock market", "In quantum physics,", "What caused", "Provide insights into", "Describe the process",
)  # fmt: skip

CODE_OPENINGS = (
    "Write a Python function that", "Write a Python program", "Write a Python class", "Write a function to",
    "Implement a", "Implement an algorithm", "Write a JavaScript function", "Write a C++ program", "Write a SQL query",
    "Write a bash script", "Create a REST API", "Create an HTML page", "Write a unit test for", "Fix the bug in this",
    "What does this code do?\n\n```python\n", "Refactor this code:\n\n```python\n", "Explain this code:\n\n```",
    "Convert this Python code to JavaScript:\n\n```python\n", "Add type hints to this function:\n\n```python\ndef",
    "Optimize this function:\n\n```python\ndef", "Write a regular expression that", "How do I use", "How do I read",
    "How do I sort", "Given a list of integers,", "Given a string s,", "Write a decorator", "Write a recursive",
    "Use pandas to", "Use numpy to", "Write a Java method", "Write a Go function", "Write a Rust function",
    "Complete the following function:\n\n```python\ndef", "Write a TypeScript interface", "Write a CSS",
    "Develop a Python program that", "Write a script that", "Parse a JSON",
    "Add docstrings to this code:\n\n```python\n",
    "Write a generator", "Write a binary search", "Write a class that represents", "Debug this code:\n\n```",
    "Rename the variable", "Add error handling to this code:\n\n```python\n", "Write a React component",
)  # fmt: skip

# {} is a text the model wrote before.
PASSAGE_TASKS = (
    "Summarize: {}", "Summarize: {}", "Summarize the following text:\n\n{}", "{}\n\nSummarize the text above.",
    "Summarize this in one sentence: {}", "List the key points of this text:\n\n{}",
    "Answer the question using the following document.\n\n{}\n\nQuestion: What is this about?",
    "{}\n\nWho or what is mentioned in this text?", "{}\n\nExplain this in more detail.",
    "Rewrite this text in simpler words:\n\n{}", "Correct any mistakes in this text and return all of it:\n\n{}",
    "{}\n\nWhat is the main point?", "Extract all names and numbers from this text:\n\n{}",
    "{}\n\nRepeat the most important sentence of this text.", "Improve this:\n\n{}", "Turn this into a list:\n\n{}",
    "Continue this text:\n\n{}", "{}\n\nWrite three questions about this text and answer them.",
)  # fmt: skip

# What a user says next, after an answer.
NEXT_TURNS = (
    "Explain that in more detail.", "Give me an example.", "Can you make it shorter?", "Why?", "What else?",
    "Rewrite it for a child.", "Put that into a table.", "What are the disadvantages?", "Now make it more formal.",
    "Summarize what you said.", "Are you sure?", "Give me three more.", "How would I start?", "Translate it to French.",
    "Turn it into a list.", "What is the most important point?", "Continue.", "Compare it with the alternatives.",
)  # fmt: skip

NEXT_TURNS_ON_CODE = (
    "Add type hints and a docstring.", "Write unit tests for it.", "Explain it line by line.", "Make it faster.",
    "Rewrite it in JavaScript.", "Rewrite it in Python.", "Handle errors and bad input.", "Now as a class.",
    "Can you do it without libraries?", "Add comments.", "Show me how to use it.", "What is its complexity?",
    "Rename the variables so that they say what they are.", "Add logging.", "Make it shorter.", "Rewrite it in C++.",
    "There is a bug in it. Fix it.", "Add a command line interface.", "Now do the opposite.", "Give me another way.",
)  # fmt: skip

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a concise assistant. Answer briefly.", "You are an expert programmer.",
    "Answer in detail and step by step.", "You are a friendly teacher.", "You are a professional translator.",
)  # fmt: skip
