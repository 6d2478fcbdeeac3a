package keyring

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	recordFormat = 1
	secretSize   = 32
)

// errDamaged is the error for a value in etcd that this package did not write.
var errDamaged = errors.New("damaged record")

// keys are the etcd keys below a prefix. They share one range, so that one watch
// sees them in order.
type keys struct{ prefix string }

func (k keys) all() string               { return k.prefix + "keyring" }
func (k keys) records() string           { return k.prefix + "keyring/" }
func (k keys) record(name string) string { return k.records() + name }
func (k keys) covers() string            { return k.prefix + "keyring-cover/" }

// digest is the head of a replica's digest, part a part of it.
func (k keys) digest(replica string) string { return k.covers() + replica }
func (k keys) part(replica string, number int) string {
	return k.digest(replica) + "/" + strconv.Itoa(number)
}

// election is the prefix that concurrency.NewElection wants, leaders what it
// makes of it.
func (k keys) election() string { return k.prefix + "keyring-leader" }
func (k keys) leaders() string  { return k.election() + "/" }

// record is a keyring in etcd.
type record struct {
	Format int `json:"format"`
	// ID tells this keyring from an earlier one of the same name.
	ID string `json:"id"`
	// UID is that of the Keyring resource.
	UID string `json:"uid"`
	// Revision of the configuration in which the resource was first seen. An
	// older configuration can't tell whether it exists.
	Revision int64 `json:"revision"`
	// Last is the number of the newest epoch that there ever was.
	Last uint64 `json:"last"`
	// Epochs are sorted by number.
	Epochs []sealedEpoch `json:"epochs"`
}

// sealedEpoch is an epoch with its secret.
type sealedEpoch struct {
	Epoch
	// Sealed is the secret, sealed with sealContext.
	Sealed []byte `json:"sealed"`
}

// sealContext binds a sealed secret to its place.
func sealContext(key, id string, number uint64) []byte {
	return fmt.Appendf(nil, "%s#%s#%d", key, id, number)
}

func newRecord(uid string, revision int64, last uint64) *record {
	return &record{Format: recordFormat, ID: randomID(), UID: uid, Revision: revision, Last: last}
}

func randomID() string {
	id := make([]byte, 8)
	_, _ = rand.Read(id) // never fails
	return hex.EncodeToString(id)
}

func (r *record) ring() Ring {
	ring := Ring{Last: r.Last, Epochs: make([]Epoch, len(r.Epochs))}
	for i, e := range r.Epochs {
		ring.Epochs[i] = e.Epoch
	}
	return ring
}

// after returns the record after actions, with secrets for new epochs.
func (r *record) after(now time.Time, key string, actions []Action, seal func(plaintext, context []byte) ([]byte, error)) (*record, error) {
	ring := r.ring().Do(now, actions)
	next := &record{Format: recordFormat, ID: r.ID, UID: r.UID, Revision: r.Revision, Last: ring.Last}
	sealed := make(map[uint64][]byte, len(r.Epochs))
	for _, e := range r.Epochs {
		sealed[e.Number] = e.Sealed
	}
	for _, e := range ring.Epochs {
		if sealed[e.Number] == nil {
			made, err := newSecret(sealContext(key, r.ID, e.Number), seal)
			if err != nil {
				return nil, fmt.Errorf("seal epoch %d: %w", e.Number, err)
			}
			sealed[e.Number] = made
		}
		next.Epochs = append(next.Epochs, sealedEpoch{Epoch: e, Sealed: sealed[e.Number]})
	}
	return next, nil
}

func newSecret(context []byte, seal func(plaintext, context []byte) ([]byte, error)) ([]byte, error) {
	secret := make([]byte, secretSize)
	defer clear(secret)
	_, _ = rand.Read(secret) // never fails
	return seal(secret, context)
}

func (r *record) encode() ([]byte, error) { return json.Marshal(r) }

// decodeRecord reads a record. It must hold what Step relies on, since whoever
// can write to etcd could otherwise make the leader panic. Errors: errDamaged.
func decodeRecord(data []byte) (*record, error) {
	r := &record{}
	if err := json.Unmarshal(data, r); err != nil {
		// Not the error itself: it can quote what it read.
		return nil, fmt.Errorf("%w: it is not JSON of the expected form", errDamaged)
	}
	if r.Format != recordFormat {
		return nil, fmt.Errorf("%w: format %d, this control plane reads format %d", errDamaged, r.Format, recordFormat)
	}
	if len(r.Epochs) > MaxEpochs {
		return nil, fmt.Errorf("%w: it holds %d epochs, at most %d are possible", errDamaged, len(r.Epochs), MaxEpochs)
	}
	var before uint64
	count := map[resealv1.EpochState]int{}
	for _, e := range r.Epochs {
		if e.Number <= before || e.Number > r.Last {
			return nil, fmt.Errorf("%w: epoch %d is out of order", errDamaged, e.Number)
		}
		if e.State < resealv1.EpochState_EPOCH_STATE_PREPARED || e.State > resealv1.EpochState_EPOCH_STATE_RETIRED || len(e.Sealed) == 0 {
			return nil, fmt.Errorf("%w: epoch %d has no known state or no secret", errDamaged, e.Number)
		}
		count[e.State]++
		before = e.Number
	}
	if count[resealv1.EpochState_EPOCH_STATE_ACTIVE] > 1 || count[resealv1.EpochState_EPOCH_STATE_PREPARED] > 1 || r.ID == "" {
		return nil, fmt.Errorf("%w: it has two active or two prepared epochs, or no id", errDamaged)
	}
	return r, nil
}

// keyringSpec is a Keyring resource.
type keyringSpec struct {
	name string
	uid  string
	spec *resealv1.Keyring // with defaults
}

func specsOf(snapshot *resealv1.Snapshot) []keyringSpec {
	var specs []keyringSpec
	for _, resource := range snapshot.Kind("Keyring") {
		specs = append(specs, keyringSpec{
			name: resource.GetMetadata().GetName(),
			uid:  resource.GetMetadata().GetUid(),
			spec: resource.GetKeyring().WithDefaults(),
		})
	}
	return specs
}

func (k keyringSpec) selects(labels map[string]string) bool {
	return fleet.Selects(k.spec.GetEdgeSelector(), labels)
}

// nameOf is what follows prefix in an etcd key.
func nameOf(key []byte, prefix string) (string, bool) {
	return strings.CutPrefix(string(key), prefix)
}
