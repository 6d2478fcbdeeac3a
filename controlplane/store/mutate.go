package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxAttempts bounds how often a change without expected revision is planned
// again, because another replica was faster. In each round one of them wins.
const maxAttempts = 32

// maxWarnings bounds those of a response.
const maxWarnings = 100

// mutation is a call that changes the configuration.
type mutation struct {
	author   string
	message  string
	expected int64 // 0: any
	dryRun   bool
	now      bool // see record
	// shrinks says that it makes room: it is tried in a full store too.
	shrinks bool
	// allowLarge lets it be large.
	allowLarge bool
	// edges are the labels of the live edges, nil until they are needed.
	edges *[]map[string]string
	// plan decides what changes in a state. It is called again when that state
	// turns out to be old.
	plan func(*state) (*plan, error)
}

// plan is what a mutation does to a state.
type plan struct {
	changes      []change
	rolledBackTo int64
	// warnings are the violations of resources that it leaves as they are.
	warnings []*resealv1.Violation
	// large says why it is large.
	large []string
	// after is the configuration that a dry run would lead to, nil otherwise.
	after *resealv1.Snapshot
}

// change is what happens to one resource. Secrets in it are sealed. An after
// that differs from before has no revision until it is committed.
type change struct {
	ref           *resealv1.ResourceRef
	action        resealv1.Change_Action
	before, after *resealv1.Resource
}

// effective are the changes that change something.
func (p *plan) effective() []change {
	var found []change
	for _, c := range p.changes {
		if c.action != resealv1.Change_ACTION_UNCHANGED {
			found = append(found, c)
		}
	}
	return found
}

// base is the newest state, and what a transaction on it is guarded by.
type base struct {
	*state
	fence int64 // mod revision of the fence key, 0 when absent
}

// mutate makes a change: it returns the revision after it and what it did.
func (s *Store) mutate(ctx context.Context, m mutation) (int64, *plan, error) {
	if reason := s.cfg.Full(); reason != nil && !m.dryRun && !m.shrinks {
		return 0, nil, s.full(reason)
	}
	revision, p, err := s.serialised(ctx, m)
	if errors.Is(err, errAskEdges) {
		// They are asked without the lock: other replicas may take their time.
		edges := s.cfg.Edges(ctx)
		m.edges = &edges
		return s.serialised(ctx, m)
	}
	return revision, p, err
}

// serialised makes a change while no other of this replica is under way.
func (s *Store) serialised(ctx context.Context, m mutation) (int64, *plan, error) {
	if err := s.lock(ctx); err != nil {
		return 0, nil, err
	}
	defer func() { <-s.writing }()
	for attempt := range maxAttempts {
		revision, p, err := s.attempt(ctx, m)
		if !errors.Is(err, errLost) {
			return revision, p, err
		}
		pause := newBackoff(time.Millisecond+rand.N(time.Duration(attempt+1)*time.Millisecond), time.Second)
		pause.sleep(ctx)
	}
	return 0, nil, fmt.Errorf("%w: %d other changes came first", ErrUnavailable, maxAttempts)
}

// attempt plans and commits m once. It fails with errLost when the state that
// it planned on is no longer the newest.
func (s *Store) attempt(ctx context.Context, m mutation) (int64, *plan, error) {
	base, err := s.current(ctx)
	if err != nil {
		return 0, nil, err
	}
	if m.expected != 0 && m.expected != base.revision() {
		return 0, nil, &ConflictError{Expected: m.expected, Current: base.revision()}
	}
	p, err := m.plan(base.state)
	if err != nil {
		return 0, nil, err
	}
	effective := p.effective()
	if len(effective) == 0 {
		return base.revision(), p, nil
	}
	violations, standing := s.validate(base.snapshot, effective)
	if len(violations) > 0 {
		return 0, nil, &resealv1.ViolationsError{Violations: violations}
	}
	p.warnings = standing[:min(len(standing), maxWarnings)]
	if p.large, err = s.large(base.snapshot, m, effective); err != nil {
		return 0, nil, err
	}
	tx, err := s.transaction(base, m, p, effective)
	if err != nil {
		return 0, nil, err
	}
	if m.dryRun {
		p.after = after(base.snapshot, effective)
		forgetAssigned(p)
		return base.revision(), p, nil
	}
	if err := s.audit(ctx, tx, m.message, effective); err != nil {
		return 0, nil, err
	}
	revision, err := s.commit(ctx, tx)
	if err != nil {
		return 0, nil, err
	}
	for _, c := range effective {
		if c.after != nil {
			c.after.Metadata.Revision = revision
		}
	}
	s.log.Info("changed the configuration", "revision", revision, "author", m.author, "changes", len(effective))
	for _, violation := range p.warnings {
		s.log.Warn("a stored resource breaks a rule, edges may hold it back", "violation", violation.Text())
	}
	s.awaitOwn(ctx, revision)
	return revision, p, nil
}

// lock keeps the changes of this replica from racing with each other.
func (s *Store) lock(ctx context.Context) error {
	timer := time.NewTimer(lockTimeout)
	defer timer.Stop()
	select {
	case s.writing <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("%w: other changes are still waiting for etcd", ErrUnavailable)
	}
}

// current is the newest state of all replicas: it asks etcd which that is and
// waits for the watch to bring it. Without that a replica that lags would call
// a change unchanged, or refuse it, because of what was true before.
func (s *Store) current(ctx context.Context) (*base, error) {
	select {
	case <-s.ready:
	default:
		if _, err := s.reach(ctx, 1); err != nil {
			return nil, err
		}
	}
	resp, err := s.readHead(ctx)
	if err != nil {
		return nil, err
	}
	found := &base{}
	if kvs := resp.Responses[1].GetResponseRange().Kvs; len(kvs) > 0 {
		found.fence = kvs[0].ModRevision
	}
	head := resp.Responses[0].GetResponseRange().Kvs
	if len(head) == 0 {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, errHeadDeleted)
	}
	found.state, err = s.reach(ctx, head[0].ModRevision)
	return found, err
}

// readHead reads head and fence, and tries again while a member is down.
func (s *Store) readHead(ctx context.Context) (*clientv3.TxnResponse, error) {
	bounded, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	wait := newBackoff(20*time.Millisecond, 500*time.Millisecond)
	for {
		resp, err := s.client.Txn(bounded).Then(clientv3.OpGet(s.keys.head()), clientv3.OpGet(s.keys.fence())).Commit()
		switch {
		case err == nil:
			return resp, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case bounded.Err() != nil || isRefused(err):
			return nil, unavailable(err)
		}
		wait.sleep(bounded)
	}
}

// reach waits until the published state is at least at revision.
func (s *Store) reach(ctx context.Context, revision int64) (*state, error) {
	bounded, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	p, err := s.until(bounded, func(p *published) bool { return p.state.revision() >= revision })
	switch {
	case err == nil:
		return p.state, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case bounded.Err() != nil:
		return nil, fmt.Errorf("%w: this replica is behind etcd: at revision %d, not yet at %d", ErrUnavailable, s.Snapshot().Revision(), revision)
	}
	return nil, err
}

// awaitOwn waits for the watch to bring a change of this call, so that the
// caller reads what it wrote. The change stands whether or not it comes.
func (s *Store) awaitOwn(ctx context.Context, revision int64) {
	if _, err := s.reach(ctx, revision); err != nil {
		s.log.Warn("a change was made, but this replica does not show it yet", "revision", revision, "error", err)
	}
}

// validate checks the configuration that changes lead to. Violations that stood
// before, of resources that the changes leave as they are, come apart: they are no
// reason to refuse changes, or a rule that is new would stop all of them.
func (s *Store) validate(snapshot *resealv1.Snapshot, changes []change) (violations, standing []*resealv1.Violation) {
	if s.cfg.Validate == nil {
		return nil, nil
	}
	touched := map[string]bool{}
	for _, c := range changes {
		touched[c.ref.Key()] = true
	}
	found := s.cfg.Validate(after(snapshot, changes))
	if len(found) == 0 {
		return nil, nil
	}
	before := map[string]bool{}
	for _, violation := range s.cfg.Validate(snapshot) {
		before[violation.Text()] = true
	}
	for _, violation := range found {
		if before[violation.Text()] && !touched[violation.GetResource().Key()] {
			standing = append(standing, violation)
		} else {
			violations = append(violations, violation)
		}
	}
	return violations, standing
}

// after is the configuration that changes lead to.
func after(snapshot *resealv1.Snapshot, changes []change) *resealv1.Snapshot {
	var upserts []*resealv1.Resource
	var deletes []*resealv1.ResourceRef
	for _, c := range changes {
		if c.after == nil {
			deletes = append(deletes, c.ref)
		} else {
			upserts = append(upserts, c.after)
		}
	}
	return snapshot.With(snapshot.Revision(), upserts, deletes)
}

// forgetAssigned removes from the plan of a dry run what only a real change
// assigns. A rollback brings back uids that existed before.
func forgetAssigned(p *plan) {
	for _, c := range p.changes {
		if c.action == resealv1.Change_ACTION_CREATED && p.rolledBackTo == 0 {
			c.after.Metadata.Uid = ""
		}
	}
}

// report is what the caller gets to see of changes.
func (s *Store) report(changes []change) []*resealv1.Change {
	reported := make([]*resealv1.Change, len(changes))
	for i, c := range changes {
		reported[i] = &resealv1.Change{
			Resource: proto.CloneOf(c.ref),
			Action:   c.action,
			Before:   s.Redact(c.before),
			After:    s.Redact(c.after),
		}
		if c.action != resealv1.Change_ACTION_UNCHANGED {
			reported[i].ChangedSecrets = s.secrets.changed(c.before, c.after)
		}
	}
	return reported
}
