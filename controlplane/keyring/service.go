package keyring

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/controlplane/office"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// commandAttempts bounds how often a command is tried again when the leader
	// or another command came first.
	commandAttempts = 10
	// seeTimeout bounds how long a write waits for this replica to see it.
	seeTimeout = 2 * time.Second
)

var errNotLoaded = status.Error(codes.Unavailable, "this replica has not read the keyrings yet")

// Status implements resealv1.KeyringServiceServer.
func (s *Server) Status(_ context.Context, request *resealv1.StatusRequest) (*resealv1.StatusResponse, error) {
	response := &resealv1.StatusResponse{Leader: s.state.leader()}
	now := time.Now()
	st := s.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.ready() {
		return nil, errNotLoaded
	}
	for _, k := range st.specs {
		if name := request.GetKeyring(); name == "" || name == k.name {
			response.Keyrings = append(response.Keyrings, s.statusOf(k, now))
		}
	}
	if len(response.Keyrings) == 0 && request.GetKeyring() != "" {
		return nil, noKeyring(request.GetKeyring())
	}
	return response, nil
}

func noKeyring(name string) error {
	return status.Errorf(codes.NotFound, "Keyring/%s does not exist", cut(name))
}

// statusOf describes one keyring. The caller holds the state's mu.
func (s *Server) statusOf(k keyringSpec, now time.Time) *resealv1.KeyringStatus {
	message := &resealv1.KeyringStatus{Name: k.name}
	found, ring, id, revision := s.state.current(k), Ring{}, "", int64(0)
	if found != nil && found.problem != nil {
		message.Problem = found.problem.Error()
	}
	if found != nil && found.record != nil {
		ring, id, revision = found.ring(), found.ID, found.revision
	}
	for _, e := range ring.Epochs {
		message.Epochs = append(message.Epochs, epochMessage(e, k.spec))
	}
	fleet := s.state.fleet(k, id, revision, now, s.config.LiveFor)
	for _, held := range fleet.Edges {
		of := s.state.ledger.covers[held.Edge].Keyrings[k.name]
		if of.Record != id {
			of = coverOf{}
		}
		message.Edges = append(message.Edges, &resealv1.EdgeCoverage{
			Edge: held.Edge, Epochs: of.Held.numbers(MaxEpochs), Active: of.Active,
		})
	}
	message.Laggards = Laggards(ring, fleet)
	if prepared, ok := ring.Prepared(); ok {
		message.ActivationDeadline = stamp(Deadline(k.spec, prepared.PreparedAt, fleet))
	} else if active, ok := ring.Active(); ok {
		message.NextRotation = stamp(NextRotation(k.spec, active))
	}
	return message
}

// Rotate implements resealv1.KeyringServiceServer.
func (s *Server) Rotate(ctx context.Context, request *resealv1.RotateRequest) (*resealv1.RotateResponse, error) {
	name := cmp.Or(request.GetKeyring(), resealv1.DefaultKeyring)
	response := &resealv1.RotateResponse{}
	err := s.command(ctx, name, func(ring Ring, damaged error) ([]Action, error) {
		if damaged != nil {
			return nil, status.Errorf(codes.DataLoss, "keyring %q: %v; revoking all of its epochs starts it anew", name, damaged)
		}
		if len(ring.Epochs) == 0 {
			return nil, status.Errorf(codes.FailedPrecondition, "keyring %q has no epoch yet, its first one is about to be made", name)
		}
		actions := Rotate(ring)
		if len(actions) == 0 {
			return nil, cantRotate(name, ring)
		}
		response.Epoch = actions[0].Epoch
		return actions, nil
	})
	if err != nil {
		return nil, err
	}
	return response, nil
}

func cantRotate(name string, ring Ring) error {
	if prepared, ok := ring.Prepared(); ok {
		return status.Errorf(codes.FailedPrecondition, "a rotation of keyring %q is under way: epoch %d has been prepared since %s",
			name, prepared.Number, prepared.PreparedAt.UTC().Format(time.RFC3339))
	}
	return status.Errorf(codes.FailedPrecondition, "keyring %q has %d epochs, no more are possible until the oldest are erased", name, len(ring.Epochs))
}

// startAnew are the actions of a record that holds nothing.
var startAnew = []Action{{Verb: Prepare, Epoch: 1, Due: true}, {Verb: Activate, Epoch: 1, Due: true}}

// Revoke implements resealv1.KeyringServiceServer.
func (s *Server) Revoke(ctx context.Context, request *resealv1.RevokeRequest) (*resealv1.RevokeResponse, error) {
	name := cmp.Or(request.GetKeyring(), resealv1.DefaultKeyring)
	switch named := len(request.GetEpochs()); {
	case named > MaxEpochs:
		return nil, status.Errorf(codes.InvalidArgument, "epochs: at most %d can be named", MaxEpochs)
	case named == 0 && !request.GetAll():
		return nil, status.Error(codes.InvalidArgument, "epochs: name at least one, or set all: every ticket becomes useless then")
	case named > 0 && request.GetAll():
		return nil, status.Error(codes.InvalidArgument, "epochs: none can be named when all is set")
	}
	var response *resealv1.RevokeResponse
	err := s.command(ctx, name, func(ring Ring, damaged error) ([]Action, error) {
		// What can't be read can still be replaced.
		actions, numbers := startAnew, []uint64(nil)
		if damaged == nil || !request.GetAll() {
			var err error
			if numbers, err = toRevoke(name, ring, request.GetEpochs()); err != nil {
				return nil, err
			}
			actions = Revoke(ring, numbers)
		}
		now := time.Now()
		response = &resealv1.RevokeResponse{Epochs: numbers, TicketAge: durationpb.New(ticketAge(now, ring, numbers))}
		if active, ok := ring.Do(now, actions).Active(); ok {
			response.Active = active.Number
		}
		if request.GetDryRun() {
			return nil, nil
		}
		return actions, nil
	})
	if err != nil {
		return nil, err
	}
	return response, nil
}

// toRevoke checks the numbers that an operator names; none: all, as the request says.
func toRevoke(name string, ring Ring, numbers []uint64) ([]uint64, error) {
	if len(ring.Epochs) == 0 {
		return nil, status.Errorf(codes.FailedPrecondition, "keyring %q has no epochs", name)
	}
	if len(numbers) == 0 {
		for _, e := range ring.Epochs {
			numbers = append(numbers, e.Number)
		}
		return numbers, nil
	}
	numbers = slices.Compact(slices.Sorted(slices.Values(numbers)))
	for _, number := range numbers {
		if _, ok := ring.Find(number); !ok {
			return nil, status.Errorf(codes.NotFound, "keyring %q has no epoch %d", name, number)
		}
	}
	return numbers, nil
}

func ticketAge(now time.Time, ring Ring, numbers []uint64) time.Duration {
	var age time.Duration
	for _, number := range numbers {
		e, _ := ring.Find(number)
		age = max(age, TicketAge(now, e))
	}
	return age
}

// command changes a keyring as an operator wishes. Any replica can do that, even
// while there is no leader: what a command does depends on nothing but the
// record, which its write names, and so does the leader in office. decide may be
// called several times; damaged says why the record can't be read. Without actions
// nothing is written.
func (s *Server) command(ctx context.Context, name string, decide func(ring Ring, damaged error) ([]Action, error)) error {
	if len(name) > maxText {
		return noKeyring(name)
	}
	for range commandAttempts {
		k, configured, err := s.find(name)
		if err != nil {
			return err
		}
		revision, err := s.attempt(ctx, k, configured, decide)
		switch {
		case errors.Is(err, errStale), errors.Is(err, office.ErrDeposed):
			continue
		case err == nil:
			s.see(ctx, revision)
			return nil
		}
		return s.asStatus(ctx, err)
	}
	return status.Errorf(codes.Aborted, "keyring %q keeps changing, try again", name)
}

func (s *Server) find(name string) (k keyringSpec, configured int64, err error) {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	if !s.state.ready() {
		return k, 0, errNotLoaded
	}
	k, ok := s.state.spec(name)
	if !ok {
		return k, 0, noKeyring(name)
	}
	return k, s.state.configured, nil
}

// refusal is what a command can't do, as a gRPC status.
type refusal struct{ status error }

func (r *refusal) Error() string { return r.status.Error() }

// attempt reads the record from etcd and writes what decide makes of it. It
// returns the revision of the write, 0 when there was none.
func (s *Server) attempt(ctx context.Context, k keyringSpec, configured int64, decide func(ring Ring, damaged error) ([]Action, error)) (int64, error) {
	key := s.keys.record(k.name)
	read, cancel := context.WithTimeout(ctx, s.config.RequestTimeout)
	answer, err := s.config.Client.Txn(read).Then(
		clientv3.OpGet(key),
		clientv3.OpGet(s.keys.leaders(), clientv3.WithFirstCreate()...),
	).Commit()
	cancel()
	if err != nil {
		return 0, fmt.Errorf("read keyring %q: %w", k.name, err)
	}
	w := write{name: k.name, fence: office.Fence{Key: s.keys.election()}}
	if kvs := answer.Responses[1].GetResponseRange().GetKvs(); len(kvs) > 0 {
		w.fence = office.Fence{Key: string(kvs[0].Key), Created: kvs[0].CreateRevision}
	}
	r, damaged := newRecord(k.uid, configured, 0), error(nil)
	if kvs := answer.Responses[0].GetResponseRange().GetKvs(); len(kvs) > 0 {
		w.before = kvs[0].ModRevision
		switch found, err := decodeRecord(kvs[0].Value); {
		case err != nil:
			damaged = err
		case found.UID != k.uid:
			r = newRecord(k.uid, configured, found.Last)
		default:
			r = found
		}
	}
	actions, err := decide(r.ring(), damaged)
	if err != nil {
		return 0, &refusal{err}
	}
	if len(actions) == 0 {
		return 0, nil
	}
	if w.after, err = r.after(time.Now(), key, actions, s.config.Seal); err != nil {
		return 0, err
	}
	revision, err := s.commit(ctx, w)
	if err == nil {
		s.report(k.name, actions, nil, s.config.Author(ctx))
	}
	return revision, err
}

// see waits, for a bounded time, until this replica knows of a revision.
func (s *Server) see(ctx context.Context, revision int64) {
	ctx, cancel := context.WithTimeout(ctx, seeTimeout)
	defer cancel()
	for {
		s.state.mu.Lock()
		seen, changed := s.state.revision >= revision, s.state.all
		s.state.mu.Unlock()
		if seen {
			return
		}
		select {
		case <-changed:
		case <-s.stopped:
			return
		case <-ctx.Done():
			return
		}
	}
}

// asStatus makes a gRPC status of an error. What etcd says is for the log.
func (s *Server) asStatus(ctx context.Context, err error) error {
	var refused *refusal
	switch {
	case errors.As(err, &refused):
		return refused.status
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	}
	s.log.Warn("a command on the keyrings failed", "error", err)
	return status.Error(codes.Unavailable, "the store does not answer, or the key-encryption key is not at hand; whether anything changed is not known")
}
