package tally

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

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
	list atomic.Pointer[[]string] // all words; each keeps its place

	mu      sync.Mutex
	places  map[string]int // in the list
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
	v := &vocabulary{places: map[string]int{}}
	all := append([]string{otherWord}, known...)
	for i, word := range all {
		v.places[word] = i
	}
	v.list.Store(&all)
	return v
}

// number is that of a word that shares has returned, word the reverse.
func (v *vocabulary) number(word string) uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return uint64(v.places[word])
}

func (v *vocabulary) word(number uint64) string { return (*v.list.Load())[number] }

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
	place, ok := v.places[key]
	switch {
	case ok:
		return v.word(uint64(place))
	case len(key) > maxWordLength || v.learned >= maxWords || !isName(key):
		return otherWord
	default:
		v.learned++
		all := append(slices.Clone(*v.list.Load()), strings.Clone(key))
		v.places[key] = len(all) - 1
		v.list.Store(&all)
		return key
	}
}
