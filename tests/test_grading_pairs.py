r"""lab/grading.py on texts as models write them: what is read, whether it is right, in what time.

Each row: the text, the right answer of the problem, and whether the text gives it.
"""

import time

import pytest

from lab.expression import value
from lab.grading import extract, grade

NUMBERS = r"""
\boxed{10^6} | 1000000 | yes
\boxed{10^6} | 10 | no
\boxed{10^{6}} | 1000000 | yes
\boxed{\sqrt{144}} | 12 | yes
\boxed{\sqrt{144}} | 144 | no
\boxed{2\sqrt{9}} | 6 | yes
\boxed{2\sqrt{9}} | 2 | no
\boxed{5!} | 120 | yes
\boxed{5!} | 5 | no
\boxed{2^{10}} | 1024 | yes
\boxed{2^{10}} | 2 | no
\boxed{2^{10} - 1} | 1023 | yes
\boxed{3 \cdot 4} | 12 | yes
\boxed{3 \cdot 4} | 3 | no
\boxed{\binom{5}{2}} | 10 | yes
\boxed{\binom{5}{2}} | 5 | no
\boxed{\frac{10!}{8!}} | 90 | yes
\boxed{\frac{10!}{8!}} | 10 | no
\boxed{(2+3)^2} | 25 | yes
\boxed{-2^2} | -4 | yes
\boxed{(-2)^2} | 4 | yes
\boxed{\sqrt[3]{27}} | 3 | yes
\boxed{\sqrt[3]{27}} | 27 | no
\boxed{8^{1/3}} | 2 | yes
\boxed{8^{1/3}} | 8 | no
\boxed{\log_2 8} | 3 | yes
\boxed{\log_2 8} | 2 | no
\boxed{3\frac{1}{2}} | 3.5 | yes
\boxed{\frac{\sqrt{16}}{2}} | 2 | yes
\boxed{x^2 + 3} | 2 | no
\boxed{x^2 + 3} | 3 | no
\boxed{3x + 2} | 3 | no
\boxed{2n} | 2 | no
\boxed{101_2} | 101 | no
\boxed{7 \times 10^3} | 7000 | yes
\boxed{7 \times 10^{-2}} | 0.07 | yes
\boxed{10^6 \text{ dollars}} | 1000000 | yes
\boxed{2^5 \text{ ways}} | 32 | yes
\boxed{\$10^3} | 1000 | yes
\boxed{25\%} | 25 | yes
\boxed{25\%} | 0.25 | yes
\boxed{18 \text{ eggs}} | 18 | yes
\boxed{18\text{ cm}^2} | 18 | yes
\boxed{18 \text{ cm}^2} | 2 | no
\boxed{12\pi} | 12 | no
\boxed{2\sqrt{3}} | 2 | no
\boxed{2\sqrt{3}} | 3.46410162 | yes
\boxed{\pm 3} | 3 | no
\boxed{x = 2^4} | 16 | yes
\boxed{2^4 = 16} | 16 | yes
\boxed{16 = 2^4} | 16 | yes
\boxed{\approx 3.5} | 3.5 | yes
\boxed{\frac{7}{2} \approx 3.5} | 3.5 | yes
\boxed{6 \div 2} | 3 | yes
\boxed{1,000 \times 5} | 5000 | yes
\boxed{3 x 4} | 12 | yes
\boxed{2(3+4)} | 14 | yes
\boxed{2(3+4)} | 2 | no
\boxed{\text{about } 40} | 40 | yes
\boxed{\dfrac{3}{4} \cdot 8} | 6 | yes
\boxed{1\,000\,000} | 1000000 | yes
\boxed{10²} | 100 | yes
\boxed{√81} | 9 | yes
\boxed{5!!} | 5 | no
\boxed{2^{3^2}} | 512 | yes
\boxed{0.5 \times 10^2} | 50 | yes
\boxed{12 \text{ of the } 50} | 12 | yes
The answer is $5!$. | 120 | yes
The answer is $10^6$ dollars. | 1000000 | yes
The answer is $2^{10}$. | 1024 | yes
The answer is 42! | 42 | yes
The answer is 42!!! Great. | 42 | yes
The answer is \(\sqrt{49}\). | 7 | yes
So the total is 10^6. | 1000000 | yes
So there are 2^8 ways. | 256 | yes
Therefore we get \(\sqrt{64}\). | 8 | yes
{"answer": 42} | 42 | yes
{"reason": "2 and 3", "answer": 42, "sure": 0.9} | 42 | yes
{"answer": "42", "steps": 7} | 42 | yes
{"final_answer": "1,234 dollars", "n": 3} | 1234 | yes
{'answer': '17', 'confidence': 99} | 17 | yes
{"answer": "$18.50"} | 18.5 | yes
```json⏎{"answer": 7,⏎"checks": 3}⏎``` | 7 | yes
{"answer": -5} | -5 | yes
{"answer": "3/4", "n": 2} | 0.75 | yes
{"answer": "2^3", "n": 2} | 8 | yes
{\"answer\": \"64\", \"n\": 2} | 64 | yes
<answer>42</answer> I used 3 steps. | 42 | yes
<answer> 1,250 </answer>⏎That took 7 steps. | 1250 | yes
<answer>⏎9⏎</answer> 4 | 9 | yes
<answer>\sqrt{25}</answer> 4 | 5 | yes
<final_answer>12</final_answer> 3 | 12 | yes
<answer>42 | 42 | yes
answer = 42 of 50 | 42 | yes
Answer: `42` (3 steps) | 42 | yes
**Answer:** "42" in 3 steps | 42 | yes
I don't think the answer is 5; it is 6. | 6 | yes
The answer is 3 million. | 3000000 | yes
The answer is $2.5 billion. | 2500000000 | yes
The answer is 3 million. | 3000 | no
The answer is negative 7. | -7 | yes
The answer is 10 minus 3 = 7. | 7 | yes
The answer is 18 (3 boxes of 6). | 18 | yes
The answer is 5 m/s in 3 cases. | 5 | yes
The answer is 1/2 of 10. | 0.5 | yes
The answer is 12:30. | 13 | no
The answer is 3.0e2 | 300 | yes
The answer is 42 - as shown above in 3. | 42 | yes
He has 3 + 4 = 7 apples. | 7 | yes
It drops to -12 degrees. | -12 | yes
So, 1/2 + 1/3 = 5/6 | 5/6 | yes
The final answer is: **64** after 6 doublings. | 64 | yes
\boxed{\frac{22}{7}} | 22/7 | yes
So \boxed{3.14}. | 3.14 | yes
\boxed{12 + 5i} | 12 | no
\boxed{7^{2}-5} | 44 | yes
\boxed{\text{C}} | 3 | no
\boxed{24 \text{ hours and } 5 \text{ minutes}} | 24 | yes
\boxed{1{,}024} | 1024 | yes
\boxed{-\sqrt{25}} | -5 | yes
\boxed{-\sqrt{25}} | 25 | no
\boxed{\left(\frac{1}{2}\right)^3} | 0.125 | yes
\boxed{4!+1} | 25 | yes
\boxed{e^{0}} | 1 | yes
\boxed{0} | 0 | yes
\boxed{|{-3}|} | 3 | yes
\boxed{3:4} | 3 | no
\boxed{\$45.00} | 45 | yes
\boxed{45.} | 45 | yes
\boxed{10\%} | 10 | yes
The answer is about 3.5 hours. | 3.5 | yes
The answer is therefore 12. | 12 | yes
Answer: $12$ | 12 | yes
Final Answer: The final answer is $\boxed{204}$. I hope it is correct. | 204 | yes
ANSWER: 25 | 25 | yes
The answer is: \[ 25 \] | 25 | yes
The answer is⏎⏎\[⏎25⏎\] | 25 | yes
The answer is $x = 25$ | 25 | yes
{"answer": "25 apples and 3 pears"} | 25 | yes
{"answer": {"value": 25}} | 25 | yes
{"result": 25} | 25 | yes
Output: {"thought": "6*7", "answer": 42}⏎Done in 3 steps. | 42 | yes
#### 42. | 42 | yes
#### $42 | 42 | yes
He pays 5 dollars each for 3, which is $15 in total. | 15 | yes
It is 50% more, so 150. | 150 | yes
\boxed{50\% \text{ of } 30} | 15 | no
\boxed{2^{\frac{1}{2}}} | 2 | no
\boxed{2\times 3 = 6} | 6 | yes
\boxed{\lfloor 3.7 \rfloor} | 3.7 | no
\boxed{\sum_{i=1}^{3} i} | 3 | no
\boxed{2 \mod 5} | 2 | yes
\boxed{a_3 = 8} | 8 | yes
\boxed{f(2) = 9} | 9 | yes
\boxed{m+n = 25} | 25 | yes
\boxed{025} | 25 | yes
\boxed{\mathbf{33}} | 33 | yes
\boxed{33 }^{\circ} | 33 | yes
\boxed{5 \, \text{km/h}} | 5 | yes
\boxed{5\ \mathrm{m\,s^{-1}}} | 5 | yes
\boxed{1.2 \times 10^{-3} \text{ m}} | 0.0012 | yes
\boxed{2^{100}} | 1267650600228229401496703205376 | yes
\boxed{\sqrt{2}} | 2 | no
\boxed{9\sqrt{2}} | 9 | no
\boxed{100 - 36 = 64} | 64 | yes
\boxed{64 = 100 - 36} | 64 | yes
\boxed{7!/5!} | 42 | yes
\boxed{10^9+7} | 1000000007 | yes
\boxed{2 + 3 \times 4} | 14 | yes
\boxed{\frac{3+5}{2}} | 4 | yes
"""

CHOICES = {"A": "a red light", "B": "12 km", "C": "120 km", "D": "the train"}
LETTERS = r"""
{"answer": "C"} | C | yes
{"answer": "C"} | A | no
{"answer":"B","explanation":"A is wrong"} | B | yes
{"explanation": "Option A is too short.", "answer": "C"} | C | yes
"answer": "C" | C | yes
"answer": "c" | C | yes
"answer": "C." | C | yes
"answer": "C. 120 km" | C | yes
"answer": "(C)" | C | yes
"answer": "12 km" | B | yes
"answer": C | C | yes
{"answer": D} | D | yes
{'answer': 'D'} | D | yes
{\"answer\": \"D\"} | D | yes
```json⏎{⏎ "answer": "A"⏎}⏎``` | A | yes
"Answer": "B" and not D | B | yes
{"final_answer": "B"} | B | yes
{"answer_choice": "B"} | B | yes
{"correct_answer": "B", "other": "A"} | B | yes
{"choice": "D"} | D | yes
{"answer": ["D"]} | D | yes
{"answer": "A", "why": "(C) is too long"} | A | yes
<answer>C</answer> | C | yes
<answer>C</answer> but (A) is close | C | yes
<answer>(C)</answer> | C | yes
<answer>⏎C⏎</answer> | C | yes
<answer>C. 120 km</answer> | C | yes
<Answer> D </Answer> | D | yes
<final_answer>B</final_answer> | B | yes
<answer>12 km</answer> | B | yes
<answer>\boxed{B}</answer> | B | yes
<choice>B</choice> | B | yes
[[B]] | B | yes
I would go with C. | C | yes
I'd pick B. | B | yes
I choose D! | D | yes
My choice: B | B | yes
Final answer: **B** | B | yes
It's C. | C | yes
It is C. | C | yes
So it must be B. | B | yes
C is the best choice. | C | yes
C is correct. | C | yes
(B) is correct, because (C) is too long. | B | yes
Option C is right since option A is wrong. | C | yes
Option A is incorrect, so option B is right. | B | yes
I'd say D. | D | yes
Select (A). | A | yes
Let us choose option A. | A | yes
Correct option: B | B | yes
The correct one is C. | C | yes
The best answer would be D. | D | yes
The answer is not A but C. | C | yes
The answer is not A. | A | no
The answer isn't B, it's C. | C | yes
The answer is not (A), (B) or (C), it is D. | D | yes
I don't think the answer is A. It must be B. | B | yes
The answer cannot be A, so the answer is B. | B | yes
The answer is A because it glows. | A | yes
The answer is A train, the train. | D | yes
The answer is the train. | D | yes
So it was the train. | D | yes
We see that he travels 120 km. | C | yes
He travels 12 km, not far. | B | yes
Therefore, a red light is seen. | A | yes
A good day to you. | A | no
**B** | B | yes
B | B | yes
(B) | B | yes
B) 12 km | B | yes
b | B | no
The answer is `B`. | B | yes
The answer is "B". | B | yes
Answer - well, B is the answer. | B | yes
Hence ⇒ B | B | yes
This matches option D. | D | yes
A) a red light⏎B) 12 km⏎C) 120 km⏎I choose B. | B | yes
\boxed{\text{Option B}} | B | yes
\boxed{\mathrm{B}} | B | yes
\boxed{B. 12\,\text{km}} | B | yes
\boxed{\textbf{(D)}} | D | yes
\boxed{A} or maybe (B) | A | yes
{"answer": "A"} | A | yes
"answer": "C",⏎"confidence": "B" | C | yes
Answer: C | C | yes
Therefore the answer is option C: 120 km. | C | yes
So the answer would be B | B | yes
I believe the correct answer is B, 12 km. | B | yes
The correct choice is **B** | B | yes
B is the correct answer. | B | yes
Choice C | C | yes
Therefore, (C). | C | yes
Option C. | C | yes
The answer is option (D) the train | D | yes
Among the options, B fits best. | B | yes
Only C works. | C | yes
Eliminating A, B and D leaves C. | C | yes
A | A | yes
ANSWER: B | B | yes
my final answer is D | D | yes
The answer is B) 12 km | B | yes
The answer is B: 12 km | B | yes
Thus B. | B | yes
So, D | D | yes
Hence, option A | A | yes
I think A is right. | A | yes
The answer: C | C | yes
```json⏎{"answer": "D"}⏎```⏎The answer uses A train. | D | yes
$\boxed{\text{C}}$ | C | yes
\boxed{C: 120 km} | C | yes
"""

VERDICTS = r"""
The answer is not yes. | yes | no
The answer is not yes. | no | yes
The answer isn't yes. | no | yes
It is not true that penguins fly. | yes | no
It is not true that penguins fly. | no | yes
That is not true. | no | yes
This isn't true. | no | yes
This is never true. | no | yes
So it is not true. | no | yes
The statement is not true. | yes | no
The claim is hardly true. | no | yes
That cannot be true. | no | yes
It is not necessarily true. | no | yes
The answer is not false. | yes | yes
It is not false. | yes | yes
It is untrue. | no | yes
I would not say yes. | no | yes
I don't think the answer is yes. | no | yes
It is wrong to say that the answer is yes. | no | yes
The answer is: not true. | no | yes
\boxed{\text{not true}} | no | yes
\boxed{\text{True}} | yes | yes
Answer: certainly not. | no | yes
Definitely not. | no | yes
Of course not. | no | yes
{"answer": "Yes"} | yes | yes
{"answer": "no", "why": "it is true that they swim"} | no | yes
{"answer": true} | yes | yes
{"answer": false} | no | yes
"answer": "No" | no | yes
<answer>No</answer> yes? | no | yes
<answer>yes</answer> | yes | yes
<answer>⏎True⏎</answer> | yes | yes
Yes or no? No. | no | yes
Is it true or false? It is false. | no | yes
There is no doubt that it is true. | yes | yes
There is no doubt: yes. | yes | yes
There is no evidence. Yes, it could. | yes | yes
Yes, there is no law against it. | yes | yes
No, that is not true. | no | yes
No. It is true that it has wings, but it does not fly. | no | yes
It is true that it has wings. So no. | no | yes
It is true that penguins swim. | yes | yes
It is false that penguins fly. | no | yes
Thus, the answer is no. | no | yes
Therefore, yes. | yes | yes
That is correct. | yes | yes
That is incorrect. | no | yes
That is not correct. | no | yes
Nope. | no | yes
Yeah, it can. | yes | yes
The answer is 'yes'. | yes | yes
The answer is **Yes**, since no bird is a fish. | yes | yes
Nobody knows. | no | no
So the answer is: no. | no | yes
No, he could not. | no | yes
Yes. | yes | yes
The final answer is Yes | yes | yes
False | no | yes
It is not the case that the answer is yes. | no | yes
It isn't true. | no | yes
It's not true | no | yes
I can't say it's true. | no | yes
The answer is no, since it's not true. | no | yes
That's true. | yes | yes
This would not be true. | no | yes
Therefore the claim is false. | no | yes
Therefore, the statement is not true. | no | yes
The answer is not no. | yes | yes
The answer is: Not true | no | yes
The answer cannot be yes. | no | yes
The answer can't be yes, so it's no. | no | yes
The answer is clearly yes. | yes | yes
So, it's not true that all birds fly. | no | yes
There is no way it is true. | no | yes
Neither is true. | no | yes
The claim does not hold, so the answer is no | no | yes
It is doubtful that it is true | yes | no
\boxed{\text{Not yes}} | no | yes
<answer>not true</answer> | no | yes
{"answer": "not true"} | no | yes
It is far from true. | no | yes
No one can say yes. | yes | no
"""

LATEX = r"""
\boxed{10^6} | 1000000 | yes
\boxed{\sqrt{16}} | 4 | yes
\boxed{\sqrt{16}} | 16 | no
\boxed{5!} | 120 | yes
\boxed{5!} | 5 | no
\boxed{\frac{\sqrt{9}}{6}} | \frac{1}{2} | yes
\boxed{2\sqrt{3}} | 2\sqrt{3} | yes
\boxed{2\sqrt{3}} | 3\sqrt{2} | no
\boxed{x^2+1} | x^2 + 1 | yes
\boxed{x^2+1} | x^2 - 1 | no
\boxed{\left(3, 4\right)} | (3,4) | yes
\boxed{(3,4)} | (4,3) | no
\boxed{2^{-1}} | \frac12 | yes
\boxed{\binom{6}{3}} | 20 | yes
\boxed{12\pi} | 12\pi | yes
\boxed{12\pi} | 12 | no
\boxed{4210_5} | 4210_{5} | yes
\boxed{4210_5} | 4210 | no
\boxed{90^\circ} | 90 | yes
\boxed{\text{Evelyn}} | \text{Evelyn} | yes
\boxed{3 \text{ cm}} | 3 | yes
\boxed{-\frac{1}{2}} | -0.5 | yes
\boxed{[0, 1)} | [0,1) | yes
\boxed{[0, 1)} | [0,1] | no
The answer is $\frac{1}{2}$. | \frac{1}{2} | yes
{"answer": "\\frac{1}{2}"} | \frac{1}{2} | yes
{"answer": "\frac{1}{2}", "n": 1} | \frac{1}{2} | yes
<answer>$\frac{3}{4}$</answer> | \frac{3}{4} | yes
<answer>x+1</answer> | x + 1 | yes
{"answer": 0.5} | \frac{1}{2} | yes
\boxed{\frac{1}{\sqrt{2}}} | \frac{1}{\sqrt{2}} | yes
\boxed{x=\frac{10}{2}} | 5 | yes
\boxed{1,2,3} | 1,2,3 | yes
\boxed{2,3} | 23 | no
The answer is $\boxed{\frac{3}{2}}$ | 1.5 | yes
<answer>⏎\frac{1}{3}⏎</answer> | \frac{1}{3} | yes
{"answer": "$\sqrt{2}$"} | \sqrt{2} | yes
The answer is 5!. | 120 | yes
\boxed{3m} | 3 | no
Answer: $x^2$ | x^2 | yes
"answer": "(3, 4)" | (3,4) | yes
<answer>\{1,2\}</answer> | \{1,2\} | yes
"""

TABLE = [
    (kind, *[cell.strip().replace("⏎", "\n") for cell in line.rsplit("|", 2)])
    for kind, rows in [
        ("number", NUMBERS),
        ("choice", LETTERS),
        ("yesno", VERDICTS),
        ("math", LATEX),
    ]
    for line in rows.strip().splitlines()
]


def judged(text, gold, kind):
    found = extract(text, kind, CHOICES if kind == "choice" else None)
    return grade(found, gold, kind), found


def test_at_least_98_percent_of_tricky_pairs_are_judged_right():
    wrong = [
        (kind, text, gold, judged(text, gold, kind)[1])
        for kind, text, gold, right in TABLE
        if judged(text, gold, kind)[0] is not (right == "yes")
    ]
    assert len(TABLE) >= 200
    assert len(wrong) <= 0.02 * len(TABLE), "\n".join(map(str, wrong))


PIECES = (
    "0",
    "1,",
    " ",
    "\n",
    "(",
    "{",
    "[",
    '"',
    "<answer>",
    "####",
    "not ",
    "yes no ",
    "2^",
    "-",
)
PIECES += (
    "\\boxed{",
    "\\boxed{1}",
    "answer is ",
    '"answer": ',
    "\\sqrt{",
    "\\frac{1}",
    "1!",
    "is A ",
)
PIECES += ("\\text{", "not A or ", "is ", "\\\\", "$", "\\(", "so it is ", "x ", ". ", "1 1/", "e9")


@pytest.mark.parametrize("kind", ["number", "choice", "yesno", "math"])
def test_hostile_texts_of_many_tokens_are_read_at_once(kind):
    texts = [piece * (65536 // max(2, len(piece))) for piece in PIECES]  # of 32,768 tokens
    texts += [f"\\boxed{{{text}}}" for text in texts] + [f"The answer is {text}" for text in texts]
    texts += ["The answer is" + "\n" * 40000, "answer" + " \n" * 40000 + "is"]
    for text in texts:
        start = time.perf_counter()
        judged(text, "B" if kind == "choice" else "yes" if kind == "yesno" else "5", kind)
        assert time.perf_counter() - start < 2, text[:30]


@pytest.mark.parametrize(
    "text",
    ["9^9^9^9", "(((9!)!)!)!", "1/0", "0^{-1}", "x", "", "(", "1+", "2 3", "__import__('os')"]
    + ["(" * 100 + "1" + ")" * 100, "2^" * 9000 + "2", "9" * 401 + "!", "\\log_1 5", "5!!"],
)
def test_what_is_no_expression_or_too_large_has_no_value(text):
    assert value(text) is None
