package tally

import (
	"cmp"
	"slices"
	"sync"

	"google.golang.org/protobuf/reflect/protoreflect"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxWords bounds the keys beyond those of the contract. They become labels
	// of metrics, so they are bounded for the fleet and not only per edge.
	maxWords = 64
	// maxWordLength is in bytes.
	maxWordLength = 64
	// otherWord takes the counts of the keys over a bound.
	otherWord = "other"
)

// vocabulary is the set of keys that a map of counters may have. Keys that are
// not in the contract are learned, so that an older control plane shows what
// newer edges count, until there are too many.
type vocabulary struct {
	mu      sync.Mutex
	words   map[string]string // each to itself, so that one copy is kept
	learned int
}

type vocabularies [divided]*vocabulary

func newVocabularies() *vocabularies {
	return &vocabularies{
		byError:  newVocabulary(),
		byMiss:   newVocabulary(labels(resealv1.MissReason(0).Descriptor())...),
		byClose:  newVocabulary(labels(resealv1.CloseKind(0).Descriptor())...),
		byCloser: newVocabulary("us", "peer"),
	}
}

func labels(enum protoreflect.EnumDescriptor) []string {
	var all []string
	for i := 1; i < enum.Values().Len(); i++ {
		all = append(all, resealv1.ValueLabel(enum.Values().Get(i)))
	}
	return all
}

func newVocabulary(known ...string) *vocabulary {
	v := &vocabulary{words: map[string]string{otherWord: otherWord}}
	for _, word := range known {
		v.words[word] = word
	}
	return v
}

// shares are the counts by known keys, sorted, zeros left out.
func (v *vocabulary) shares(counts map[string]uint64) []share {
	v.mu.Lock()
	defer v.mu.Unlock()
	var shares []share
	for key, count := range counts {
		if count == 0 {
			continue
		}
		word := v.wordLocked(key)
		if i := slices.IndexFunc(shares, func(s share) bool { return s.key == word }); i >= 0 {
			shares[i].count += count
			continue
		}
		shares = append(shares, share{word, count})
	}
	slices.SortFunc(shares, func(a, b share) int { return cmp.Compare(a.key, b.key) })
	return shares
}

func (v *vocabulary) wordLocked(key string) string {
	word, ok := v.words[key]
	switch {
	case ok:
		return word
	case len(key) > maxWordLength || v.learned >= maxWords || !isName(key):
		return otherWord
	default:
		v.learned++
		v.words[key] = key
		return key
	}
}
