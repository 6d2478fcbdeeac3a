package keyring

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func sampleRecord(t testing.TB, s *sealer) *record {
	t.Helper()
	r := newRecord("uid", 7, 0)
	for i, verbs := range [][]Verb{{Prepare, Activate}, {Prepare}, {Retire}} {
		for _, verb := range verbs {
			number := r.Last
			if verb == Retire {
				number = 1
			}
			var err error
			if r, err = r.after(at(time.Duration(i)*time.Minute), "key", []Action{{Verb: verb, Epoch: number}}, s.seal); err != nil {
				t.Fatal(err)
			}
		}
	}
	return r
}

func TestRecordRoundTrip(t *testing.T) {
	s := newSealer()
	r := sampleRecord(t, s)
	data, err := r.encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeRecord(data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, got); diff != "" {
		t.Error(diff)
	}
	for i, e := range got.Epochs {
		if secret, err := s.open(e.Sealed, sealContext("key", r.ID, e.Number)); err != nil || !bytes.Equal(secret, s.all()[i]) {
			t.Errorf("epoch %d: %v", e.Number, err)
		}
		// A sealed secret can't be moved to another epoch, keyring or record.
		for _, place := range [][]byte{sealContext("key", r.ID, e.Number+1), sealContext("other", r.ID, e.Number), sealContext("key", "id", e.Number)} {
			if _, err := s.open(e.Sealed, place); err == nil {
				t.Errorf("epoch %d opens as %s", e.Number, place)
			}
		}
	}
}

func TestDamagedRecords(t *testing.T) {
	sound := sampleRecord(t, newSealer())
	for name, damage := range map[string]func(*record){
		"another format":     func(r *record) { r.Format = 2 },
		"no id":              func(r *record) { r.ID = "" },
		"no secret":          func(r *record) { r.Epochs[0].Sealed = nil },
		"no state":           func(r *record) { r.Epochs[0].State = 0 },
		"unknown state":      func(r *record) { r.Epochs[0].State = 9 },
		"number 0":           func(r *record) { r.Epochs[0].Number = 0 },
		"out of order":       func(r *record) { slices.Reverse(r.Epochs) },
		"twice":              func(r *record) { r.Epochs[0].Number = 2 },
		"beyond the last":    func(r *record) { r.Last = 1 },
		"two active":         func(r *record) { r.Epochs[0].State, r.Epochs[1].State = active, active },
		"two prepared":       func(r *record) { r.Epochs[0].State, r.Epochs[1].State = prepared, prepared },
		"more than possible": func(r *record) { r.Epochs = append(r.Epochs, make([]sealedEpoch, MaxEpochs)...) },
	} {
		data, _ := sound.encode()
		r := &record{}
		if err := json.Unmarshal(data, r); err != nil {
			t.Fatal(err)
		}
		damage(r)
		data, _ = r.encode()
		if _, err := decodeRecord(data); !errors.Is(err, errDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzDecodeRecord: what decodes can be stepped and written.
func FuzzDecodeRecord(f *testing.F) {
	s := newSealer()
	data, _ := sampleRecord(f, s).encode()
	f.Add(data)
	f.Add([]byte(`{"format":1,"id":"a","last":3,"epochs":[{"number":3,"state":2,"sealed":"AA=="}]}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data)
		if err != nil {
			if !errors.Is(err, errDamaged) {
				t.Error(err)
			}
			return
		}
		actions := Step(t0, hourly, r.ring(), fleetOf())
		next, err := r.after(t0, "key", actions, s.seal)
		if err != nil {
			t.Fatal(err)
		}
		again, err := next.encode()
		if err != nil {
			return // times beyond the year 9999
		}
		if _, err := decodeRecord(again); err != nil && r.Last < 1<<63 {
			t.Errorf("%s: %v", again, err)
		}
	})
}

func TestSpans(t *testing.T) {
	for text, want := range map[string][]uint64{"": nil, "1": {1}, "1-3": {1, 2, 3}, "1-2,4,7-8": {1, 2, 4, 7, 8}} {
		s := spansOf(want)
		if got, _ := s.MarshalText(); string(got) != text {
			t.Errorf("%v is written %q", want, got)
		}
		var back spans
		if err := back.UnmarshalText([]byte(text)); err != nil || !slices.Equal(back.numbers(100), want) {
			t.Errorf("%q is read as %v, %v", text, back.numbers(100), err)
		}
	}
	if got := (spans{{1, 1 << 62}}).numbers(3); len(got) != 3 {
		t.Errorf("a limit of 3 gives %d numbers", len(got))
	}
	for _, text := range []string{"x", "1-", "-1", "2-1", "1,1", "3,1", "1-3,2", ",", "1,,2", "18446744073709551616", strings.Repeat("1,", MaxEpochs)} {
		if err := new(spans).UnmarshalText([]byte(text)); !errors.Is(err, errDamaged) {
			t.Errorf("%q: %v", text, err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		numbers := rapid.SliceOfDistinct(rapid.Uint64Range(1, 50), rapid.ID[uint64]).Draw(t, "numbers")
		slices.Sort(numbers)
		s := spansOf(numbers)
		for n := range uint64(60) {
			if s.has(n) != slices.Contains(numbers, n) {
				t.Fatalf("%v has %d: %t", s, n, s.has(n))
			}
		}
		if got := s.numbers(100); !slices.Equal(got, numbers) {
			t.Fatalf("%v lists %v", s, got)
		}
	})
}

func FuzzReadPart(f *testing.F) {
	f.Add([]byte(`{"groups":[{"cover":{"labels":{"a":"b"},"acked":true,"keyrings":{"default":{"record":"r","held":"1-3,5","active":3}}},"edges":["e/1"],"left":["f/zz"]}]}`))
	f.Add([]byte(`{"groups":[{"edges":["e/1","e/2"]},{"cover":{"keyrings":{"default":{"held":"0-18446744073709551615"}}}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := readPart(data)
		if err != nil {
			if !errors.Is(err, errDamaged) {
				t.Error(err)
			}
			return
		}
		for _, one := range all {
			for name, of := range one.cover.Keyrings {
				held := one.cover.held("e", name, of.Record)
				for _, n := range of.Held.numbers(100) {
					if !held.Has(n) {
						t.Errorf("%v lists %d and does not have it", of.Held, n)
					}
				}
			}
		}
		made := makePart(all)
		if made == nil {
			return
		}
		back, err := readPart(made)
		if err != nil || len(back) != len(all) {
			t.Errorf("%s: %d of %d, %v", made, len(back), len(all), err)
		}
	})
}

// TestVault: secrets that no record holds are zeroed; what is not a secret is
// never given out (CVE-2020-13777).
func TestVault(t *testing.T) {
	given := map[string][]byte{
		"good": bytes.Repeat([]byte{7}, 32), "zero": make([]byte, 32), "short": {1, 2, 3}, "empty": {},
	}
	v := newVault(func(sealed, _ []byte) ([]byte, error) { return given[string(sealed)], nil })
	learn := func(sealed string) error {
		return v.learn("key", &record{Epochs: []sealedEpoch{{Epoch: Epoch{Number: 1, State: resealv1.EpochState_EPOCH_STATE_ACTIVE}, Sealed: []byte(sealed)}}})
	}
	for _, bad := range []string{"zero", "short", "empty"} {
		if err := learn(bad); err == nil {
			t.Errorf("%s is taken for a secret", bad)
		}
		if _, ok := v.copy([]byte(bad)); ok {
			t.Errorf("%s is given out", bad)
		}
	}
	if err := learn("good"); err != nil {
		t.Fatal(err)
	}
	copied, ok := v.copy([]byte("good"))
	if !ok || !bytes.Equal(copied, bytes.Repeat([]byte{7}, 32)) {
		t.Errorf("got %x", copied)
	}
	v.retain(map[string]bool{"good": true})
	if _, ok := v.copy([]byte("good")); !ok {
		t.Error("a secret in use was forgotten")
	}
	v.retain(nil)
	if _, ok := v.copy([]byte("good")); ok || !bytes.Equal(given["good"], make([]byte, 32)) {
		t.Error("the forgotten secret is not zeroed")
	}
	if bytes.Equal(copied, make([]byte, 32)) {
		t.Error("a copy was zeroed, too")
	}
	response := &resealv1.HoldResponse{Keyrings: []*resealv1.KeyringSecrets{{Epochs: []*resealv1.EpochSecret{{Secret: copied}}}}}
	wipe(response)
	if !bytes.Equal(copied, make([]byte, 32)) {
		t.Error("a response that was sent is not wiped")
	}
}
