package feed

import (
	"bytes"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Whatever a server sends, an edge holds only what fits the hash, and what it
// held before is not touched.
func FuzzUpdate(f *testing.F) {
	a, b := encoded(f, "a", "a:1"), encoded(f, "b", "b:1")
	start := full(1, a)
	for _, update := range []*resealv1.Update{
		start, full(2, a, b), on(1, 2, full(2, a, b).Hash, b), on(1, 3, start.Hash), on(9, 10, start.Hash),
		{ClusterId: "c", BaseRevision: 1, Revision: 2, Hash: full(2).Hash, Deletes: []*resealv1.ResourceRef{{Kind: "BackendPool", Name: "a"}}},
	} {
		data, err := proto.Marshal(update)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		update := &resealv1.Update{}
		if proto.Unmarshal(data, update) != nil {
			return
		}
		var nothing *holding
		held, err := nothing.with(start)
		if err != nil {
			t.Fatal(err)
		}
		next, err := held.with(update)
		if !bytes.Equal(resealv1.HashEncoded(held.encoded()), start.Hash) {
			t.Fatal("the update changed what was held before")
		}
		if err != nil {
			if !errors.Is(err, errProtocol) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(resealv1.HashEncoded(next.encoded()), update.GetHash()) || next.revision <= 0 {
			t.Fatal("holds what does not fit its hash")
		}
		if base := update.GetBaseRevision(); base != 0 && base != 1 {
			t.Fatalf("took an update on revision %d", base)
		}
		if len(next.problems()) > 0 {
			return
		}
		if got := next.snapshot(); got.Len() != len(next.resources) || got.Revision() != next.revision {
			t.Fatalf("snapshot of %d resources at %d", got.Len(), got.Revision())
		}
		kept, err := next.marshal()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := unmarshalHolding(kept); err != nil || !bytes.Equal(again.hash, next.hash) {
			t.Fatalf("kept form: %v", err)
		}
	})
}
