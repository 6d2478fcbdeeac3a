package tally

import (
	"maps"
	"slices"
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
	words atomic.Pointer[lexicon]

	mu      sync.Mutex // of who learns a word
	learned int
}

// lexicon are the words of a vocabulary. It does not change: a word that is learned makes
// a new one, so that reports are read without a lock.
type lexicon struct {
	list   []string // each keeps its place
	places map[string]int
}

type vocabularies [divided]*vocabulary

func newVocabularies() *vocabularies {
	return &vocabularies{
		byError:  newVocabulary(),
		byMiss:   newVocabulary(labels(resealv1.MissReason(0).Descriptor())...),
		byClose:  newVocabulary(labels(resealv1.CloseKind(0).Descriptor())...),
		byCloser: newVocabulary("us", "peer"),
		byAnswer: newVocabulary("1xx", "2xx", "3xx", "4xx", "5xx"),
		byWait:   newVocabulary(resealv1.WaitLabels...),
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
	v := &vocabulary{}
	made := &lexicon{list: append([]string{otherWord}, known...), places: map[string]int{}}
	for i, word := range made.list {
		made.places[word] = i
	}
	v.words.Store(made)
	return v
}

func (v *vocabulary) word(place uint64) string { return v.words.Load().list[place] }

// place is that of a word, which is learned when it is new. It is that of otherWord when
// it can't be.
func (v *vocabulary) place(word []byte) int {
	if place, ok := v.words.Load().places[string(word)]; ok {
		return place
	}
	if len(word) > maxWordLength || !isName(string(word)) {
		return 0
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	now := v.words.Load()
	if place, ok := now.places[string(word)]; ok {
		return place
	}
	if v.learned >= maxWords {
		return 0
	}
	v.learned++
	more := &lexicon{list: append(slices.Clip(now.list), string(word)), places: maps.Clone(now.places)}
	more.places[string(word)] = len(now.list)
	v.words.Store(more)
	return len(now.list)
}
