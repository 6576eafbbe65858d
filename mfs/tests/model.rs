//! Random operations against a reference model: the same answers, the same tree, and nothing for fsck to find.

mod support;

use proptest::prelude::*;
use support::model::{Model, Op, op};
use support::run;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_agree_with_the_model(ops in proptest::collection::vec(op(), 1..200), seed in any::<u64>()) {
        run(seed, 16_384, move |bed| async move {
            let mut fs = bed.mount().await;
            let mut model = Model::new(mfs::ops::Operations::root(&*fs));
            for op in &ops {
                match op {
                    Op::Wait { secs } => bed.sleep((*secs).into()).await,
                    Op::Remount => {
                        fs.unmount().await.unwrap();
                        drop(fs);
                        bed.fsck().await;
                        fs = bed.mount().await;
                    }
                    _ => model.apply(&fs, op).await,
                }
            }
            model.compare(&fs).await;
            fs.unmount().await.unwrap();
            drop(fs);
            bed.fsck().await;
            let fs = bed.mount().await;
            model.compare(&fs).await;
            bed.unmount_and_check(fs).await;
        });
    }
}
