package trust

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// storeTimeout bounds one exchange with the store.
	storeTimeout = 5 * time.Second

	checkKey     = "trust/check"
	authorityKey = "trust/ca"

	// checkValue is sealed under checkKey: whoever can unseal it has the right
	// key-encryption key.
	checkValue = "reseal"
)

// Open loads the certificate authority, or makes it if there is none, and
// issues this replica's server certificate. Replicas that race end with the same
// authority. While the store does not answer, Open tries again until ctx ends.
// Call it once.
//
// Errors: ErrKEK when the key-encryption key is missing or not the one of this
// store (nothing is changed then); ErrSealed; a wrong or expired authority.
func (t *Trust) Open(ctx context.Context) error {
	if err := checkTrustDomain(t.trustDomain); err != nil {
		return err
	}
	o := &opening{trust: t}
	delay := 100 * time.Millisecond
	for {
		err := o.attempt(ctx)
		if err == nil {
			break
		}
		if !unavailable(err) {
			return fmt.Errorf("open trust: %w", err)
		}
		t.logger.Warn("the store does not answer, trying again", "error", err, "after", delay)
		timer := time.NewTimer(delay/2 + rand.N(delay/2))
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("open trust: %w (last: %w)", ctx.Err(), err)
		case <-timer.C:
		}
		delay = min(2*delay, 5*time.Second)
	}
	t.opened.Store(&opened{envelope: o.envelope, authority: o.authority, created: o.created})
	if err := t.renewServer(); err != nil {
		t.opened.Store(nil)
		return err
	}
	if o.created {
		t.logger.Info("made a certificate authority", "trust_domain", t.trustDomain, "ca_hash", t.CAHash())
	}
	return nil
}

// opening is what one Open holds over its attempts, so that a write whose answer
// was lost is recognised as its own.
type opening struct {
	trust     *Trust
	envelope  *envelope
	generated bool   // this Open made the KEK file
	candidate []byte // the sealed authority that it offers

	authority *authority
	created   bool
}

func (o *opening) attempt(ctx context.Context) error {
	if err := o.loadKEK(ctx); err != nil {
		return err
	}
	if err := o.checkKEK(ctx); err != nil {
		return err
	}
	return o.loadAuthority(ctx)
}

func (o *opening) loadKEK(ctx context.Context) error {
	if o.envelope != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	held, err := o.trust.client.Get(ctx, o.trust.prefix+"trust/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return err
	}
	kek, generated, err := loadKEK(o.trust.kekFile, held.Count == 0)
	if err != nil {
		return err
	}
	defer clear(kek)
	o.generated = generated
	o.envelope, err = newEnvelope(kek)
	if err != nil {
		return err
	}
	if info, err := os.Stat(o.trust.kekFile); err == nil && info.Mode().Perm()&0o077 != 0 {
		o.trust.logger.Warn("others may read the key-encryption key", "file", o.trust.kekFile, "mode", info.Mode().Perm().String())
	}
	return nil
}

// checkKEK compares the key with the one of the store.
func (o *opening) checkKEK(ctx context.Context) error {
	offered, err := o.envelope.seal([]byte(checkValue), []byte(checkKey))
	if err != nil {
		return err
	}
	stored, err := o.createIfAbsent(ctx, checkKey, offered)
	if err != nil {
		return err
	}
	value, err := o.envelope.unseal(stored, []byte(checkKey))
	if errors.Is(err, ErrKEK) {
		if o.generated {
			// Another replica was first, with another key. This one sealed
			// nothing and would only mislead.
			err = errors.Join(err, os.Remove(o.trust.kekFile))
		}
		return fmt.Errorf("%w; %s is not the file that this store was made with: give every replica the same --kek-file", err, o.trust.kekFile)
	}
	if err == nil && string(value) != checkValue {
		err = ErrSealed
	}
	if err != nil {
		return fmt.Errorf("%s: %w", o.trust.prefix+checkKey, err)
	}
	return nil
}

func (o *opening) loadAuthority(ctx context.Context) error {
	if o.candidate == nil {
		fresh, err := newAuthority(o.trust.trustDomain)
		if err != nil {
			return err
		}
		record, err := fresh.marshal()
		if err != nil {
			return err
		}
		defer clear(record)
		if o.candidate, err = o.envelope.seal(record, []byte(authorityKey)); err != nil {
			return err
		}
	}
	stored, err := o.createIfAbsent(ctx, authorityKey, o.candidate)
	if err != nil {
		return err
	}
	record, err := o.envelope.unseal(stored, []byte(authorityKey))
	if err != nil {
		return fmt.Errorf("%s: %w", o.trust.prefix+authorityKey, err)
	}
	defer clear(record)
	o.authority, err = parseAuthority(record)
	if err == nil {
		err = o.authority.check(o.trust.trustDomain)
	}
	if err != nil {
		return fmt.Errorf("certificate authority: %w", err)
	}
	o.created = bytes.Equal(stored, o.candidate)
	return nil
}

// createIfAbsent puts value under key unless there is one, and returns what is
// there in the end. A store that is full takes no writes, not even one that would
// change nothing, so it is read first.
func (o *opening) createIfAbsent(ctx context.Context, key string, value []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	key = o.trust.prefix + key
	found, err := o.trust.client.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	if len(found.Kvs) == 1 {
		return found.Kvs[0].Value, nil
	}
	answer, err := o.trust.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, string(value))).
		Else(clientv3.OpGet(key)).
		Commit()
	if err != nil {
		return nil, err
	}
	if answer.Succeeded {
		return value, nil
	}
	held := answer.Responses[0].GetResponseRange().Kvs
	if len(held) != 1 {
		return nil, fmt.Errorf("%s: unexpected answer of the store", key)
	}
	return held[0].Value, nil
}

// unavailable tells whether an error of the store may go away by itself.
func unavailable(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	code := status.Code(err)
	if etcdErr := (rpctypes.EtcdError{}); errors.As(err, &etcdErr) {
		code = etcdErr.Code()
	}
	switch code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Aborted:
		return true
	}
	return false
}
