package tally

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// onWire is a report as an edge sends it.
func onWire(message *resealv1.ReportRequest) heard {
	data, err := proto.Marshal(message)
	if err != nil {
		panic(err)
	}
	h, err := hear(data)
	if err != nil {
		panic(err)
	}
	return h
}

// decoded are the counters in a report.
func decoded(h heard, words *vocabularies) (pools, listeners []*packed) {
	all := func([]byte) bool { return true }
	pools, _, err := h.counters(poolsField, words, all)
	if err != nil {
		panic(err)
	}
	listeners, _, err = h.counters(listenersField, words, all)
	if err != nil {
		panic(err)
	}
	return pools, listeners
}

func reportOf(message *resealv1.ReportRequest, words *vocabularies, last, before *report) *report {
	h := onWire(message)
	pools, listeners := decoded(h, words)
	return newReport(h, pools, listeners, time.Now(), last, before)
}

func packedOf(stats *resealv1.Stats, words *vocabularies) *packed {
	pools, _ := decoded(onWire(&resealv1.ReportRequest{Pools: []*resealv1.Stats{stats}}), words)
	return pools[0]
}

func countersOf(stats *resealv1.Stats, words *vocabularies) *counters {
	return words.unpack(packedOf(stats, words))
}

// takeMessage takes a report as a stream does.
func (s *Server) takeMessage(from *stream, message *resealv1.ReportRequest) error {
	h := onWire(message)
	pools, listeners, err := s.decode(context.Background(), from, h)
	if err != nil {
		return err
	}
	return s.take(from, h, pools, listeners)
}

// What is decoded by hand is what protobuf decodes, whatever was sent: no report is read
// wrongly, and none that is malformed is taken.
func FuzzReport(f *testing.F) {
	for _, message := range []*resealv1.ReportRequest{
		{},
		{Edge: "e", BootId: "b", Answers: 7, Partial: true},
		{Edge: "e", Pools: []*resealv1.Stats{{Name: "p", Requests: 1 << 40, Errors: map[string]uint64{"connect": 3}, Handshakes: &resealv1.Handshakes{Full: 1, ResumedPsk: 9}}}},
		{Listeners: []*resealv1.Stats{{
			Name: "l", Misses: map[string]uint64{"expired": 3}, Connections: &resealv1.ConnectionStats{Opened: 1, Active: -4, Idle: 5, Share: -1},
			Epochs: []*resealv1.EpochStats{{Keyring: "default", Epoch: 3, Resumed: 4, Misses: map[string]uint64{"expired": 1}}, {Resumed: 1}},
		}}},
	} {
		data, err := proto.Marshal(message)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("\n\x010\b0")) // a field with another type than it should have
	f.Fuzz(func(t *testing.T, data []byte) {
		var want resealv1.ReportRequest
		wrong := proto.Unmarshal(data, &want)
		h, err := hear(data)
		if err != nil {
			if wrong == nil {
				t.Fatalf("refused: %v", err)
			}
			return
		}
		words := newVocabularies()
		all := func([]byte) bool { return true }
		for _, number := range []uint64{poolsField, listenersField} {
			kept, _, err := h.counters(number, words, all)
			if err == nil {
				for _, p := range kept {
					words.unpack(p).stats()
				}
			} else if wrong == nil {
				t.Fatalf("refused: %v", err)
			}
		}
		if wrong == nil && (h.edge != want.GetEdge() || h.bootID != want.GetBootId() || h.answers != want.GetAnswers() || h.partial != want.GetPartial()) {
			t.Fatalf("read %+v of %v", h, &want)
		}
	})
}

func TestReportsAreReadAsProtobufDoes(t *testing.T) {
	words := newVocabularies()
	rapid.Check(t, func(t *rapid.T) {
		message := &resealv1.ReportRequest{Edge: "e", BootId: "b", Answers: rapid.Uint64().Draw(t, "answers"), Partial: rapid.Bool().Draw(t, "partial")}
		pool, listener := drawStats(t), drawStats(t)
		pool.Name, listener.Name = "pool", "listener"
		listener.Epochs = []*resealv1.EpochStats{epochStats("", 0, 3, nil), epochStats("default", 4, 0, map[string]uint64{"expired": 1})}
		message.Pools, message.Listeners = []*resealv1.Stats{pool}, []*resealv1.Stats{listener}
		h := onWire(message)
		if h.edge != "e" || h.bootID != "b" || h.answers != message.GetAnswers() || h.partial != message.GetPartial() || !h.counted {
			t.Fatalf("read %+v", h)
		}
		pools, listeners := decoded(h, words)
		got := append(statsOf(words, pools), statsOf(words, listeners)...)
		if diff := cmp.Diff([]*resealv1.Stats{pool, listener}, got, protocmp.Transform()); diff != "" {
			t.Fatal(diff)
		}
	})
}

// A fleet that comes back sends whole reports all at once: reading one must not need
// many times its size.
func TestReadingReportsAllocatesLittle(t *testing.T) {
	words := newVocabularies()
	message := &resealv1.ReportRequest{Edge: "e"}
	for i := range 200 {
		message.Pools = append(message.Pools, &resealv1.Stats{
			Name: "pool" + string(rune('a'+i%26)) + string(rune('a'+i/26)), Requests: 1_000_000, Errors: map[string]uint64{"connect": 3, "timeout": 7},
			Misses: map[string]uint64{"expired": 12, "no_session": 1}, Closes: map[string]uint64{"close_notify_both": 24_000},
		})
	}
	h := onWire(message)
	decoded(h, words)
	// Two for each pool: itself and its data; and the list, as it grows.
	if allocated := testing.AllocsPerRun(20, func() { decoded(h, words) }); allocated > 2*200+40 {
		t.Errorf("reading 200 pools allocates %.0f times", allocated)
	}
}
