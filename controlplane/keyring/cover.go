package keyring

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// cover is what a live edge has acked. It is immutable.
type cover struct {
	// Labels are those of the edge that some selector asks for: what an edge may say
	// as it likes is not written into etcd.
	Labels map[string]string `json:"labels,omitempty"`
	// Terms is the terms.id of the selectors that Labels are for.
	Terms string `json:"terms,omitempty"`
	// Acked says that the edge has acked a response on its stream.
	Acked bool `json:"acked,omitempty"`
	// Keyrings are what it acked, by name.
	Keyrings map[string]coverOf `json:"keyrings,omitempty"`
}

// coverOf is what an edge has acked of a keyring.
type coverOf struct {
	// Record is the id of the record that held the epochs.
	Record string `json:"record"`
	// Held are the epochs' numbers.
	Held spans `json:"held,omitempty"`
	// Active is the epoch that it encrypts with. 0: none.
	Active uint64 `json:"active,omitempty"`
}

// key is a text that equal covers have alone. It is made with little stack, on which
// each edge's goroutine would sit afterwards.
func (c *cover) key() string {
	text := strconv.AppendBool(strconv.AppendQuote(nil, c.Terms), c.Acked)
	for _, name := range slices.Sorted(maps.Keys(c.Labels)) {
		text = strconv.AppendQuote(strconv.AppendQuote(append(text, ' '), name), c.Labels[name])
	}
	for _, name := range slices.Sorted(maps.Keys(c.Keyrings)) {
		of := c.Keyrings[name]
		text = strconv.AppendQuote(strconv.AppendQuote(append(text, '\n'), name), of.Record)
		text = strconv.AppendUint(text, of.Active, 10)
		for _, run := range of.Held {
			text = strconv.AppendUint(append(text, ','), run.first, 10)
			text = strconv.AppendUint(append(text, '-'), run.last, 10)
		}
	}
	return string(text)
}

// terms are the labels that selectors ask for: those of all keyrings, and
// Config.Selectors. They are immutable.
type terms struct {
	id    string // equal terms have equal ids, never empty
	pairs map[string]map[string]bool
}

func termsOf(selectors []*resealv1.EdgeSelector) terms {
	t := terms{pairs: map[string]map[string]bool{}}
	for _, selector := range selectors {
		for name, value := range selector.GetMatchLabels() {
			if t.pairs[name] == nil {
				t.pairs[name] = map[string]bool{}
			}
			t.pairs[name][value] = true
		}
	}
	sum := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(t.pairs)) {
		for _, value := range slices.Sorted(maps.Keys(t.pairs[name])) {
			fmt.Fprintf(sum, "%q=%q\n", name, value)
		}
	}
	t.id = hex.EncodeToString(sum.Sum(nil)[:8])
	return t
}

// of are the labels that matter. No selector tells them from all labels.
func (t terms) of(labels map[string]string) map[string]string {
	var matter map[string]string
	for name, values := range t.pairs {
		if value, ok := labels[name]; ok && values[value] {
			if matter == nil {
				matter = map[string]string{}
			}
			matter[name] = value
		}
	}
	return matter
}

// held is what counts for the rules: numbers of another record mean nothing.
func (c *cover) held(edge, name, record string) Held {
	of := c.Keyrings[name]
	if of.Record != record {
		of = coverOf{}
	}
	return Held{Edge: edge, Unknown: !c.Acked, Has: of.Held.has, Active: of.Active}
}

// spans is a set of epoch numbers, kept as runs, because epochs usually follow
// each other and etcd keeps each write for a while: "5-12,14".
type spans []span

type span struct{ first, last uint64 }

// spansOf takes sorted numbers.
func spansOf(numbers []uint64) spans {
	var s spans
	for _, n := range numbers {
		if last := len(s) - 1; last >= 0 && n <= s[last].last+1 {
			s[last].last = max(n, s[last].last)
			continue
		}
		s = append(s, span{n, n})
	}
	return s
}

func (s spans) has(number uint64) bool {
	return slices.ContainsFunc(s, func(run span) bool { return run.first <= number && number <= run.last })
}

// numbers lists the set, at most limit of it.
func (s spans) numbers(limit int) []uint64 {
	var numbers []uint64
	for _, run := range s {
		for n := run.first; len(numbers) < limit; n++ {
			numbers = append(numbers, n)
			if n == run.last {
				break
			}
		}
	}
	return numbers
}

// MarshalText writes "5-12,14".
func (s spans) MarshalText() ([]byte, error) {
	var text strings.Builder
	for i, run := range s {
		if i > 0 {
			text.WriteByte(',')
		}
		text.WriteString(strconv.FormatUint(run.first, 10))
		if run.last > run.first {
			text.WriteString("-" + strconv.FormatUint(run.last, 10))
		}
	}
	return []byte(text.String()), nil
}

// UnmarshalText reads what MarshalText writes. Errors: errDamaged.
func (s *spans) UnmarshalText(text []byte) error {
	*s = nil
	if len(text) == 0 {
		return nil
	}
	for part := range strings.SplitSeq(string(text), ",") {
		first, last, isRun := strings.Cut(part, "-")
		if !isRun {
			last = first
		}
		from, err := strconv.ParseUint(first, 10, 64)
		if err != nil {
			return fmt.Errorf("%w: %q is not a number", errDamaged, first)
		}
		to, err := strconv.ParseUint(last, 10, 64)
		if err != nil {
			return fmt.Errorf("%w: %q is not a number", errDamaged, last)
		}
		if to < from || len(*s) > 0 && from <= (*s)[len(*s)-1].last || len(*s) >= MaxEpochs {
			return fmt.Errorf("%w: runs of numbers are out of order", errDamaged)
		}
		*s = append(*s, span{from, to})
	}
	return nil
}
