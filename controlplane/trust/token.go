package trust

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	tokensPrefix = "trust/tokens/"
	edgesPrefix  = "trust/edges/"

	tokenIDSize     = 8 // bytes
	tokenSecretSize = 32
	maxTokenText    = 256 // bytes
	maxTokens       = 10_000

	// For this long the edge that used a token may use it again, in case the answer
	// was lost.
	repeatWindow = 10 * time.Minute
)

// joinToken is what the store holds of a token, under trust/tokens/<id>. The
// secret is not there, only its hash. The key is on a lease, so that etcd
// removes it when the token ends.
type joinToken struct {
	Edge       string            `json:"edge"`
	Labels     map[string]string `json:"labels,omitempty"`
	CreatedAt  time.Time         `json:"createdAt"`
	ExpiresAt  time.Time         `json:"expiresAt"`
	CreatedBy  string            `json:"createdBy"`
	SecretHash []byte            `json:"secretHash"` // SHA-256
	UsedAt     time.Time         `json:"usedAt,omitzero"`
	UsedKey    []byte            `json:"usedKey,omitempty"` // SHA-256 of the edge's public key
	// Of a token for several edges; it is not used in the sense of the above.
	Uses int `json:"uses,omitempty"` // how many there may be
	Took int `json:"took,omitempty"` // how many there were
}

// storedToken is a joinToken with where it was found.
type storedToken struct {
	joinToken
	id       string
	revision int64 // of its key
}

func (k *joinToken) used() bool { return !k.UsedAt.IsZero() }

// several tells whether the token is for all edges whose ids match.
func (k *joinToken) several() bool { return strings.Contains(k.Edge, "*") }

// invites tells whether the token is for an edge.
func (k *joinToken) invites(id string) bool {
	matches, err := path.Match(k.Edge, id) // nothing else in a pattern means more than itself
	return err == nil && matches && checkName(id) == nil
}

// left is how many edges may still enrol with the token.
func (k *joinToken) left() int {
	switch {
	case k.several():
		return max(k.Uses-k.Took, 0)
	case k.used():
		return 0
	}
	return 1
}

// open tells whether the token can still be used for an edge for the first time.
func (k *joinToken) open(now time.Time) bool { return k.left() > 0 && now.Before(k.ExpiresAt) }

// repeats tells whether the edge that used the token may use it again.
func (k *joinToken) repeats(now time.Time, keyHash []byte) bool {
	return k.used() && now.Before(k.UsedAt.Add(repeatWindow)) && subtle.ConstantTimeCompare(k.UsedKey, keyHash) == 1
}

func (k *storedToken) info() *resealv1.JoinToken {
	return &resealv1.JoinToken{
		TokenId:   k.id,
		Edge:      k.Edge,
		Labels:    k.Labels,
		CreatedAt: timestamppb.New(k.CreatedAt),
		ExpiresAt: timestamppb.New(k.ExpiresAt),
		CreatedBy: k.CreatedBy,
		UsesLeft:  uint32(k.left()), //nolint:gosec // at most maxUses
	}
}

// edgeRecord is what the store holds of an edge, under trust/edges/<id>. Without
// it an edge can't renew.
type edgeRecord struct {
	Labels map[string]string `json:"labels,omitempty"`
	// Enrolment is the id of the token that the edge used last, with something random
	// after it where others use the same. It is in the edge's certificates, so that
	// those from an earlier enrolment don't renew.
	Enrolment  string    `json:"enrolment"`
	UsedKey    []byte    `json:"usedKey,omitempty"` // as a joinToken's, of a token for several edges
	EnrolledAt time.Time `json:"enrolledAt"`
	InvitedBy  string    `json:"invitedBy"`
}

// repeats tells whether the edge that enrolled with a token for several may do so again.
func (e *edgeRecord) repeats(token string, now time.Time, keyHash []byte) bool {
	return strings.HasPrefix(e.Enrolment, token+"-") && now.Before(e.EnrolledAt.Add(repeatWindow)) && subtle.ConstantTimeCompare(e.UsedKey, keyHash) == 1
}

// credential is a join token as an edge presents it.
type credential struct {
	id     string
	secret []byte
}

func newCredential() credential {
	random := make([]byte, tokenIDSize+tokenSecretSize)
	_, _ = rand.Read(random) // never fails
	return credential{id: hex.EncodeToString(random[:tokenIDSize]), secret: random[tokenIDSize:]}
}

func (c credential) text(caHash string) string {
	return caHash + "." + c.id + "." + base64.RawURLEncoding.EncodeToString(c.secret)
}

func (c credential) hash() []byte {
	sum := sha256.Sum256(c.secret)
	return sum[:]
}

// parseCredential reads "<ca hash>.<token id>.<secret>", or without the hash,
// which concerns only the edge. ok is false for anything else, and for the hash
// of another authority.
func parseCredential(text, caHash string) (c credential, ok bool) {
	if len(text) > maxTokenText {
		return credential{}, false
	}
	parts := strings.Split(text, ".")
	if len(parts) == 3 && strings.EqualFold(parts[0], caHash) {
		parts = parts[1:]
	}
	if len(parts) != 2 || !isTokenID(parts[0]) {
		return credential{}, false
	}
	secret, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || len(secret) != tokenSecretSize {
		return credential{}, false
	}
	return credential{id: parts[0], secret: secret}, true
}

func isTokenID(text string) bool {
	if len(text) != 2*tokenIDSize {
		return false
	}
	for _, r := range text {
		if !('0' <= r && r <= '9' || 'a' <= r && r <= 'f') {
			return false
		}
	}
	return true
}

// errTaken is the error of useToken when the token changed since it was read.
var errTaken = errors.New("the token changed")

// addToken stores a new token, and returns the revision of its key.
func (t *Trust) addToken(ctx context.Context, id string, token joinToken) (int64, error) {
	value, err := json.Marshal(token)
	if err != nil {
		return 0, err
	}
	lease, err := t.client.Grant(ctx, leaseSeconds(token.ExpiresAt.Sub(token.CreatedAt)))
	if err != nil {
		return 0, err
	}
	// An id that exists already is as likely as a guessed one.
	answer, err := t.client.Put(ctx, t.prefix+tokensPrefix+id, string(value), clientv3.WithLease(lease.ID))
	if err != nil {
		t.dropLease(ctx, lease.ID)
		return 0, err
	}
	return answer.Header.Revision, nil
}

// useOne takes one of the uses of a token for several edges, and stores the edge, in one
// transaction. Errors: errTaken when another use was faster, or the edge is enrolled by
// now.
func (t *Trust) useOne(ctx context.Context, token storedToken, id string, edge edgeRecord) error {
	token.Took++
	tokenValue, err := json.Marshal(token.joinToken)
	if err != nil {
		return err
	}
	edgeValue, err := json.Marshal(edge)
	if err != nil {
		return err
	}
	key, edgeKey := t.prefix+tokensPrefix+token.id, t.prefix+edgesPrefix+id
	answer, err := t.client.Txn(ctx).
		If(
			clientv3.Compare(clientv3.ModRevision(key), "=", token.revision),
			clientv3.Compare(clientv3.CreateRevision(edgeKey), "=", 0),
		).
		Then(clientv3.OpPut(key, string(tokenValue), clientv3.WithIgnoreLease()), clientv3.OpPut(edgeKey, string(edgeValue))).
		Commit()
	if err != nil {
		return err
	}
	if !answer.Succeeded {
		return errTaken
	}
	t.registry.putEdge(id, edge)
	return nil
}

// useToken marks a token as used by the key with the given hash, and stores the
// edge, in one transaction. Errors: errTaken when another use was faster.
func (t *Trust) useToken(ctx context.Context, token storedToken, keyHash []byte, now time.Time) error {
	token.UsedAt, token.UsedKey = now, keyHash
	tokenValue, err := json.Marshal(token.joinToken)
	if err != nil {
		return err
	}
	edge := edgeRecord{Labels: token.Labels, Enrolment: token.id, EnrolledAt: now, InvitedBy: token.CreatedBy}
	edgeValue, err := json.Marshal(edge)
	if err != nil {
		return err
	}
	lease, err := t.client.Grant(ctx, leaseSeconds(repeatWindow))
	if err != nil {
		return err
	}
	key := t.prefix + tokensPrefix + token.id
	answer, err := t.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", token.revision)).
		Then(
			clientv3.OpPut(key, string(tokenValue), clientv3.WithLease(lease.ID)),
			clientv3.OpPut(t.prefix+edgesPrefix+token.Edge, string(edgeValue)),
		).
		Commit()
	if err != nil {
		// It may have been carried out: then the lease is needed.
		return err
	}
	if !answer.Succeeded {
		t.dropLease(ctx, lease.ID)
		return errTaken
	}
	t.registry.putEdge(token.Edge, edge)
	return nil
}

// dropLease ends a lease that holds nothing. If that fails, it ends by itself.
func (t *Trust) dropLease(ctx context.Context, lease clientv3.LeaseID) {
	if _, err := t.client.Revoke(ctx, lease); err != nil {
		t.logger.Debug("an unused lease stays until it expires", "error", err)
	}
}

// leaseSeconds rounds up: the expiry in the record decides, the lease only
// cleans up.
func leaseSeconds(d time.Duration) int64 { return int64(d/time.Second) + 1 }

// token reads one token; nil when there is none.
func (t *Trust) token(ctx context.Context, id string) (*storedToken, error) {
	answer, err := t.client.Get(ctx, t.prefix+tokensPrefix+id)
	if err != nil || len(answer.Kvs) == 0 {
		return nil, err
	}
	token, err := t.parseToken(answer.Kvs[0])
	return &token, err
}

// openTokens reads all tokens that can be used, sorted by edge, then id.
func (t *Trust) openTokens(ctx context.Context) ([]storedToken, error) {
	answer, err := t.client.Get(ctx, t.prefix+tokensPrefix, clientv3.WithPrefix())
	if err != nil {
		return nil, err
	}
	now := time.Now()
	var tokens []storedToken
	for _, kv := range answer.Kvs {
		token, err := t.parseToken(kv)
		if err != nil {
			return nil, err
		}
		if token.open(now) {
			tokens = append(tokens, token)
		}
	}
	slices.SortFunc(tokens, func(a, b storedToken) int {
		if c := strings.Compare(a.Edge, b.Edge); c != 0 {
			return c
		}
		return strings.Compare(a.id, b.id)
	})
	return tokens, nil
}

func (t *Trust) parseToken(kv *mvccpb.KeyValue) (storedToken, error) {
	token := storedToken{id: strings.TrimPrefix(string(kv.Key), t.prefix+tokensPrefix), revision: kv.ModRevision}
	if err := json.Unmarshal(kv.Value, &token.joinToken); err != nil {
		return storedToken{}, fmt.Errorf("%w: %s: %w", errRecord, kv.Key, err)
	}
	return token, nil
}

// errRecord is the error for a record in the store that can't be read.
var errRecord = errors.New("malformed record")

// edge reads the record of an edge; nil when it is not enrolled.
func (t *Trust) edge(ctx context.Context, id string) (*edgeRecord, error) {
	key := t.prefix + edgesPrefix + id
	answer, err := t.client.Get(ctx, key)
	if err != nil || len(answer.Kvs) == 0 {
		return nil, err
	}
	record := &edgeRecord{}
	if err := json.Unmarshal(answer.Kvs[0].Value, record); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errRecord, key, err)
	}
	return record, nil
}
