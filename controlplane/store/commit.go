package store

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// ownOps are the operations of a transaction besides those on resources:
	// head, history, removal of old history.
	ownOps = 3
	// auditOps and auditBytes are what Config.Audit may add.
	auditOps   = 2
	auditBytes = 34 << 10
	// opOverhead is more than what the encoding of an operation adds to its
	// key and value.
	opOverhead = 32
	// resolveTimeout bounds how long the outcome of a transaction is asked for.
	resolveTimeout = 15 * time.Second
)

// errLost means that the guard of a transaction did not hold: nothing changed.
var errLost = errors.New("another change came first")

// transaction is a change, ready to be sent.
type transaction struct {
	id       string
	sequence int64
	guards   []clientv3.Cmp
	ops      []clientv3.Op
}

// transaction builds the etcd transaction of changes to base, and fails with
// ErrTooLarge when etcd would not take it.
func (s *Store) transaction(base *base, m mutation, p *plan, changes []change) (*transaction, error) {
	head := &record{
		Sequence: base.sequence + 1, ApplyID: uuid.NewString(), Author: m.author, Message: m.message,
		Time: time.Now().UTC(), RolledBackTo: p.rolledBackTo, LargeAllowed: len(p.large) > 0, Now: m.now, Count: len(changes),
	}
	tx := &transaction{id: head.ApplyID, sequence: head.Sequence}
	size := &sizes{}
	history := *head
	for _, c := range changes {
		op, value, err := s.resourceOp(c)
		if err != nil {
			return nil, err
		}
		before, err := undoOf(c)
		if err != nil {
			return nil, err
		}
		tx.ops = append(tx.ops, op)
		history.Undo = append(history.Undo, before)
		size.add(c.ref, len(op.KeyBytes())+value+base64.StdEncoding.EncodedLen(len(before.Before)))
	}
	headValue, err := head.encode()
	if err != nil {
		return nil, err
	}
	historyValue, err := history.encode()
	if err != nil {
		return nil, err
	}
	tx.ops = append(tx.ops,
		clientv3.OpPut(s.keys.head(), string(headValue)),
		clientv3.OpPut(s.keys.history(tx.sequence), string(historyValue)),
	)
	if oldest := s.oldestKept(sizesOf(base.history), tx.sequence, len(historyValue)); oldest > 1 {
		tx.ops = append(tx.ops, clientv3.OpDelete(s.keys.history(0), clientv3.WithRange(s.keys.history(oldest))))
	}
	tx.guards = []clientv3.Cmp{
		clientv3.Compare(clientv3.ModRevision(s.keys.head()), "=", base.revision()),
		clientv3.Compare(clientv3.ModRevision(s.keys.fence()), "=", base.fence),
	}
	return tx, s.checkSize(tx, len(changes), size)
}

// oldestKept is the sequence of the oldest change that stays in the history beside
// a new one of some bytes.
func (s *Store) oldestKept(history []kept, sequence int64, bytes int) int64 {
	oldest := sequence
	for _, e := range slices.Backward(history) {
		bytes += e.bytes
		if bytes > s.cfg.HistoryBytes || e.sequence <= sequence-int64(s.cfg.HistoryLimit) {
			break
		}
		oldest = e.sequence
	}
	return oldest
}

// full is the ErrFull of a store that took no write, cause being etcd's own word.
func (s *Store) full(cause error) error {
	if reason := s.cfg.Full(); reason != nil {
		cause = reason
	}
	return fmt.Errorf("%w: %s", ErrFull, cause.Error())
}

// resourceOp is the operation of a change and the size of its value. What is
// stored has no revision: etcd knows it.
func (s *Store) resourceOp(c change) (clientv3.Op, int, error) {
	key := s.keys.resource(c.ref)
	if c.after == nil {
		return clientv3.OpDelete(key), 0, nil
	}
	value, err := encodeResource(c.after)
	return clientv3.OpPut(key, string(value)), len(value), err
}

func undoOf(c change) (undo, error) {
	u := undo{Kind: c.ref.GetKind(), Name: c.ref.GetName()}
	if c.before == nil {
		return u, nil
	}
	var err error
	u.Before, err = encodeResource(c.before)
	return u, err
}

// sizes remembers the biggest part of a transaction.
type sizes struct {
	biggest *resealv1.ResourceRef
	bytes   int
}

func (z *sizes) add(ref *resealv1.ResourceRef, bytes int) {
	if z.biggest == nil || bytes > z.bytes {
		z.biggest, z.bytes = ref, bytes
	}
}

func (s *Store) checkSize(tx *transaction, changes int, size *sizes) error {
	total := 0
	for _, op := range tx.ops {
		total += len(op.KeyBytes()) + len(op.RangeBytes()) + len(op.ValueBytes()) + opOverhead
	}
	maxChanges := s.cfg.MaxOps - ownOps
	if s.cfg.Audit != nil {
		total, maxChanges = total+auditBytes, maxChanges-auditOps
	}
	biggest := fmt.Sprintf("the biggest of its %d resources is %s with %d bytes", changes, size.biggest.Key(), size.bytes)
	if total > s.cfg.MaxBytes {
		return fmt.Errorf("%w: it has %d bytes with what the history keeps, at most %d fit; %s; make resources smaller or apply them in parts",
			ErrTooLarge, total, s.cfg.MaxBytes, biggest)
	}
	if changes > maxChanges {
		return fmt.Errorf("%w: it changes %d resources, at most %d fit; %s; apply them in parts, or raise etcd's --max-txn-ops",
			ErrTooLarge, changes, maxChanges, biggest)
	}
	return nil
}

// audit has tx record what it does.
func (s *Store) audit(ctx context.Context, tx *transaction, message string, changes []change) error {
	if s.cfg.Audit == nil {
		return nil
	}
	guards, ops, err := s.cfg.Audit(ctx, message, s.report(changes))
	if err != nil {
		return fmt.Errorf("%w; nothing was changed, since it could not be recorded", unavailable(err))
	}
	tx.guards, tx.ops = append(tx.guards, guards...), append(tx.ops, ops...)
	return nil
}

// commit sends tx and returns its revision. It fails with errLost when a guard
// did not hold. Where the answer is missing it finds out what happened, so that
// every error means that nothing changed, unless it says otherwise.
func (s *Store) commit(ctx context.Context, tx *transaction) (int64, error) {
	bounded, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	resp, err := s.client.Txn(bounded).If(tx.guards...).Then(tx.ops...).
		Else(clientv3.OpGet(s.keys.history(tx.sequence))).Commit()
	switch {
	case err == nil && resp.Succeeded:
		return resp.Header.Revision, nil
	case err == nil:
		// The guard also fails when the transaction was sent twice.
		if revision, ok := tx.recorded(resp.Responses[0]); ok {
			return revision, nil
		}
		return 0, errLost
	case errors.Is(err, rpctypes.ErrNoSpace):
		return 0, s.full(err)
	case isTooLarge(err):
		return 0, fmt.Errorf("%w: etcd takes less than configured: %s", ErrTooLarge, err.Error())
	case isRefused(err):
		return 0, unavailable(err)
	}
	return s.resolve(ctx, tx, err)
}

// recorded looks for tx in the history key of its sequence number.
func (tx *transaction) recorded(resp *etcdserverpb.ResponseOp) (int64, bool) {
	kvs := resp.GetResponseRange().Kvs
	if len(kvs) == 0 {
		return 0, false
	}
	r, err := decodeRecord(kvs[0].Value)
	if err != nil || r.ApplyID != tx.id {
		return 0, false
	}
	return kvs[0].ModRevision, true
}

// resolve finds out whether tx was committed, after cause left that open. A
// transaction may still be on its way to the leader, so where there is no trace
// of it the fence is moved in the same step: then it can't be committed later.
// The caller's ctx may be over; the answer is worth more than its deadline.
func (s *Store) resolve(ctx context.Context, tx *transaction, cause error) (int64, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resolveTimeout)
	defer cancel()
	s.log.Warn("no answer to a change; finding out what became of it", "apply_id", tx.id, "error", cause)
	wait := newBackoff(20*time.Millisecond, time.Second)
	for ctx.Err() == nil {
		resp, err := s.askOutcome(ctx, tx)
		if err != nil {
			s.log.Warn("no answer about a change either", "apply_id", tx.id, "error", err)
			select {
			case <-s.stopped:
				cancel()
			default:
				wait.sleep(ctx)
			}
			continue
		}
		return s.judge(tx, resp, cause)
	}
	return 0, fmt.Errorf("%w; it is not known whether the change was made: look at the history before trying again", unavailable(cause))
}

func (s *Store) askOutcome(ctx context.Context, tx *transaction) (*clientv3.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	history := s.keys.history(tx.sequence)
	return s.client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(history), "=", 0)).
		Then(clientv3.OpGet(s.keys.head()), clientv3.OpPut(s.keys.fence(), tx.id)).
		Else(clientv3.OpGet(history)).Commit()
}

// judge reads the answer of askOutcome.
func (s *Store) judge(tx *transaction, resp *clientv3.TxnResponse, cause error) (int64, error) {
	if !resp.Succeeded {
		if revision, ok := tx.recorded(resp.Responses[0]); ok {
			return revision, nil
		}
	} else if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
		head, err := decodeRecord(kvs[0].Value)
		if err != nil || head.Sequence >= tx.sequence {
			// So many changes came after it that its record is gone.
			return 0, fmt.Errorf("%w; it is not known whether the change was made: look at the resources before trying again", unavailable(cause))
		}
	}
	return 0, fmt.Errorf("%w; nothing was changed", unavailable(cause))
}

// isRefused recognises the errors by which etcd says that it did not execute a
// request.
func isRefused(err error) bool {
	var refused rpctypes.EtcdError
	if !errors.As(err, &refused) {
		return isTooLarge(err)
	}
	switch refused.Code() {
	case codes.InvalidArgument, codes.FailedPrecondition, codes.ResourceExhausted,
		codes.PermissionDenied, codes.Unauthenticated, codes.OutOfRange:
		return true
	}
	return false
}

// isTooLarge recognises the errors of a request beyond a limit of etcd or gRPC.
func isTooLarge(err error) bool {
	if errors.Is(err, rpctypes.ErrRequestTooLarge) || errors.Is(err, rpctypes.ErrTooManyOps) {
		return true
	}
	var known rpctypes.EtcdError
	return !errors.As(err, &known) && status.Code(err) == codes.ResourceExhausted
}
